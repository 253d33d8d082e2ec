"""What all storages share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from flowagent.flows.declarations import Declaration, flag, names, refuse

_INSTEAD = {
    "result": "give result= to the Flow",
    "validate": "leave it out: paths are always made absolute",
}


class Storage(Declaration):
    """Base of all storages; a subclass is known to :meth:`from_json` by its class name.

    ``labels`` are added to those of the flow; ``secrets`` are names of secrets that loading the flow needs.
    ``artifact`` describes what registration uploaded; the backend fills it into the JSON form. ``runners``
    are those that can execute what is in it; empty: any.

    ``keeps_scripts``: registration brings a script there, rather than to refer to one. ``unstored`` names
    what the code gives for registration alone: neither the JSON form nor a pickle ever has it.
    """

    keeps_scripts: ClassVar[bool] = False
    unstored: ClassVar[tuple[str, ...]] = ()

    family: ClassVar[str] = "storage"
    common: ClassVar[tuple[str, ...]] = (
        "stored_as_script",
        "add_default_labels",
        "labels",
        "secrets",
        "artifact",
    )
    runners: ClassVar[tuple[str, ...]] = ()

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

    def to_json(self) -> dict[str, Any]:
        """The JSON form; shares nothing with this object."""
        return {**super().to_json(), **({"runners": list(self.runners)} if self.runners else {})}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Any:
        """The storage of a JSON form. :raises FlowError: its type or one of its fields is unknown."""
        return super().from_json({name: value for name, value in data.items() if name != "runners"})

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle has of it: a flow whose code names its storage takes that along, and its pickle is
        kept where others read it."""
        return {name: None if name in self.unstored else value for name, value in vars(self).items()}

    def __copy__(self) -> Any:
        """All of it, as a copy stays in this process."""
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied
