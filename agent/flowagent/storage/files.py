"""Flows that are on a machine already: files, and importable modules."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, ClassVar

from flowagent.flows.declarations import absolute, patterns, text
from flowagent.flows.errors import FlowError
from flowagent.storage.base import Storage


class Local(Storage):
    """A file on this machine: a pickle under ``directory``, or with ``stored_as_script=True`` the script.

    Without ``directory`` and ``path``, pickles go to ``$FLOWAGENT_HOME/flows``. Without ``path``, a script is
    the one that registers the flow. The hostname becomes a label unless ``add_default_labels=False``.
    ``include`` names files beside the script: with them it is stored under ``directory``, as it is then.

    :raises FlowError: arguments that contradict each other
    """

    fields: ClassVar[tuple[str, ...]] = ("directory", "path", "include")

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        path: str | os.PathLike[str] | None = None,
        stored_as_script: bool = False,
        add_default_labels: bool = True,
        include: Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        self.include = patterns(include, "storage Local: include")
        super().__init__(
            stored_as_script=stored_as_script or bool(self.include),
            add_default_labels=add_default_labels,
            **options,
        )
        self.directory = absolute(directory, "storage Local: directory")
        self.path = absolute(path, "storage Local: path")
        if self.directory and self.path:
            raise FlowError(
                "storage Local: directory= and path= exclude each other; give the one or the other"
            )
        if self.directory and self.stored_as_script and not self.include:
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
