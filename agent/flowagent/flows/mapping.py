"""Marks for the arguments of a mapped task, and how its children get theirs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flowagent.flows.errors import FlowError


class unmapped:  # read as a word: f.map(xs, y=unmapped(y))
    """An argument that all children of a mapped task get as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


class flatten:
    """An argument whose items are lists; the children are mapped over the items of those."""

    def __init__(self, value: Any) -> None:
        self.value = value


def items_of(name: str, value: Any) -> list[Any]:
    """What the children are mapped over. :raises FlowError: nothing that has items."""
    if isinstance(value, flatten):
        return [item for inner in items_of(name, value.value) for item in items_of(name, inner)]
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        kind = type(value).__name__
        raise FlowError(f"cannot map over argument {name}, which is of type {kind}; wrap it in unmapped()")
    return list(value)


def spread(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each child. :raises FlowError: nothing to map over, or lists of different lengths."""
    columns = {
        name: items_of(name, value) for name, value in inputs.items() if not isinstance(value, unmapped)
    }
    constant = {name: value.value for name, value in inputs.items() if isinstance(value, unmapped)}
    lengths = {name: len(column) for name, column in columns.items()}
    if not lengths:
        raise FlowError("there is no argument to map over; leave one of them out of unmapped()")
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise FlowError(f"mapped arguments differ in length: {shown}; use unmapped() for what is not a list")
    return [
        {**{name: column[index] for name, column in columns.items()}, **constant}
        for index in range(next(iter(lengths.values())))
    ]
