"""Declarations as they come from a store: they were not necessarily made by their constructors.

Whoever may register flows says where an agent fetches from and writes to; that must not become a way to the
agent's own files, or to more than a declaration can name.
"""

from __future__ import annotations

from collections.abc import Mapping

from flowagent.errors import BackendError, FlowError, one_line
from flowagent.flows.declarations import Declaration
from flowagent.flows.results import Result
from flowagent.models import Json
from flowagent.storage import Storage


def storage(given: Mapping[str, Json]) -> dict[str, Json]:
    """A storage as its constructor takes it. :raises BackendError: it does not."""
    return _checked(Storage, "storage", given)


def result(given: Mapping[str, Json]) -> dict[str, Json]:
    """A result declaration as its constructor takes it. :raises BackendError: it does not."""
    return _checked(Result, "result", given)


def _checked(family: type[Declaration], what: str, given: Mapping[str, Json]) -> dict[str, Json]:
    try:
        checked: dict[str, Json] = family.from_json(given).to_json()
    except (FlowError, TypeError, ValueError) as error:
        raise BackendError(
            f"{one_line(str(given.get('type')), 40)}: the flow's {what} is wrong: {one_line(str(error))}; "
            "register it again"
        ) from error
    return checked
