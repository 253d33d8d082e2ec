"""Storages: where a flow's definition lives. Plain data; the drivers are in ``flowagent_backends``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from flowagent.flows.declarations import Declaration, absolute, flag, names, refuse, text
from flowagent.flows.errors import FlowError

__all__ = ["Local", "Module", "Storage"]

_INSTEAD = {
    "result": "give result= to the Flow",
    "validate": "leave it out: paths are always made absolute",
}


class Storage(Declaration):
    """Base of all storages; a subclass is known to :meth:`from_json` by its class name.

    ``labels`` are added to those of the flow; ``secrets`` are names of secrets that loading the flow needs.
    ``artifact`` describes what registration uploaded; the backend fills it into the JSON form.
    """

    family: ClassVar[str] = "storage"
    common: ClassVar[tuple[str, ...]] = (
        "stored_as_script",
        "add_default_labels",
        "labels",
        "secrets",
        "artifact",
    )

    def __init__(
        self,
        *,
        stored_as_script: bool = False,
        add_default_labels: bool = True,
        labels: Iterable[str] | None = None,
        secrets: Iterable[str] | None = None,
        artifact: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        what = f"storage {self.type}"
        refuse(what, unknown, _INSTEAD)
        self.stored_as_script = flag(stored_as_script, f"{what}: stored_as_script")
        self.add_default_labels = flag(add_default_labels, f"{what}: add_default_labels")
        self.labels = names(labels, f"{what}: labels")
        self.secrets = names(secrets, f"{what}: secrets")
        self.artifact = None if artifact is None else dict(artifact)


class Local(Storage):
    """A file on this machine: a pickle under ``directory``, or with ``stored_as_script=True`` the script.

    Without ``directory`` and ``path``, pickles go to ``$FLOWAGENT_HOME/flows``. Without ``path``, a script is
    the one that registers the flow. The hostname becomes a label unless ``add_default_labels=False``.

    :raises FlowError: arguments that contradict each other
    """

    fields: ClassVar[tuple[str, ...]] = ("directory", "path")

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        path: str | os.PathLike[str] | None = None,
        stored_as_script: bool = False,
        add_default_labels: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(stored_as_script=stored_as_script, add_default_labels=add_default_labels, **options)
        self.directory = absolute(directory, "storage Local: directory")
        self.path = absolute(path, "storage Local: path")
        if self.directory and self.path:
            raise FlowError(
                "storage Local: directory= and path= exclude each other; give the one or the other"
            )
        if self.directory and self.stored_as_script:
            raise FlowError("storage Local: directory= is for pickles; name the script with path=")


class Module(Storage):
    """An importable module: ``Module("pkg.flows")``, ``Module("pkg.flows:attr")`` or ``Module(__name__)``."""

    fields: ClassVar[tuple[str, ...]] = ("module",)

    def __init__(self, module: str, **options: Any) -> None:
        if options.pop("stored_as_script", True) is not True:
            raise FlowError("storage Module: a module is always imported; leave stored_as_script out")
        super().__init__(stored_as_script=True, **options)
        self.module = module
        checked = text(module, "storage Module: module") or ""
        name, _, attribute = checked.partition(":")
        parts = [*name.split("."), *(attribute.split(".") if ":" in checked else ())]
        if not all(part.isidentifier() for part in parts):
            raise FlowError(
                f"storage Module: {module!r} is no module; give 'pkg.flows' or 'pkg.flows:attribute'"
            )


_COMING = ("Azure", "Bitbucket", "CodeCommit", "Docker", "GCS", "Git", "GitHub", "GitLab", "S3", "Webhook")


def __getattr__(name: str) -> Any:
    if name in _COMING:
        # not AttributeError: ``from flowagent.storage import S3`` would replace its message by its own
        raise ImportError(f"flowagent.storage has no {name} in this version; there are Local and Module")
    raise AttributeError(f"module 'flowagent.storage' has no attribute {name!r}; there are Local and Module")
