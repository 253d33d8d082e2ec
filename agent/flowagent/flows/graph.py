"""The graph of a flow: its tasks with their arguments, in an order in which they can run."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from flowagent.flows.errors import FlowError
from flowagent.flows.mapping import flatten, unmapped

if TYPE_CHECKING:
    from flowagent.flows.dag import Flow
    from flowagent.flows.tasks import Task

building: ContextVar[Flow | None] = ContextVar("flowagent_building", default=None)
"""The flow whose ``with`` block is being executed in this thread."""


class Node:
    """A task within a flow: its slug, its arguments by name, and the other tasks that it waits for."""

    def __init__(
        self, task: Task, slug: str, inputs: dict[str, Any], mapped: bool, after: list[Task]
    ) -> None:
        self.task = task
        self.slug = slug
        self.inputs = inputs
        self.mapped = mapped
        self.after = after

    def upstream(self) -> list[Task]:
        """The tasks it depends on, each once, in a stable order."""
        found = dict.fromkeys(task for value in self.inputs.values() for task in references(value))
        return list(found | dict.fromkeys(self.after))

    def mapped_over(self) -> set[Task]:
        """The upstream tasks whose values are spread over the children, item by item."""
        from flowagent.flows.tasks import Task

        return {value for value in self.inputs.values() if self.mapped and isinstance(value, Task)}


class Slugs:
    """Gives each task of a flow a slug of its own: ``load-1``, ``load-2``, in the order of their creation."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._taken: dict[str, None] = {}

    def take(self, slug: str) -> str:
        if slug in self._taken:
            raise FlowError(f"two tasks of one flow would have the slug {slug!r}; rename one of them")
        self._taken[slug] = None
        return slug

    def next(self, name: str) -> str:
        number = self._counts.get(name, 0) + 1
        while f"{name}-{number}" in self._taken:
            number += 1
        self._counts[name] = number
        return self.take(f"{name}-{number}")


def references(value: Any) -> Iterator[Task]:
    """The tasks in an argument, also those inside of lists, tuples, sets and the values of dicts."""
    from flowagent.flows.tasks import Task

    if isinstance(value, Task):
        yield value
    elif isinstance(value, (unmapped, flatten)):
        yield from references(value.value)
    elif type(value) is dict:
        for item in value.values():
            yield from references(item)
    elif type(value) in (list, tuple, set, frozenset):
        for item in value:
            yield from references(item)


def resolve(value: Any, lookup: Callable[[Task], Any]) -> Any:
    """The argument with each task in it replaced by ``lookup(task)``; untouched parts are not copied."""
    from flowagent.flows.tasks import Task

    if isinstance(value, Task):
        return lookup(value)
    if isinstance(value, (unmapped, flatten)):
        return type(value)(resolve(value.value, lookup))
    if next(references(value), None) is None:
        return value
    if type(value) is dict:
        return {key: resolve(item, lookup) for key, item in value.items()}
    return type(value)(resolve(item, lookup) for item in value)


def in_order(nodes: Sequence[Node], flow_name: str) -> list[Node]:
    """The nodes, each after all it depends on, else in the order of creation. :raises FlowError: a cycle."""
    places = {node.task: place for place, node in enumerate(nodes)}
    waits = {place: {places[task] for task in node.upstream()} for place, node in enumerate(nodes)}
    followers: dict[int, list[int]] = {place: [] for place in waits}
    for place, upstream in waits.items():
        for other in upstream:
            followers[other].append(place)
    ready = [place for place, upstream in waits.items() if not upstream]
    ordered = []
    while ready:
        place = heapq.heappop(ready)
        ordered.append(nodes[place])
        for follower in followers[place]:
            waits[follower].discard(place)
            if not waits[follower]:
                heapq.heappush(ready, follower)
    if len(ordered) < len(nodes):
        stuck = {place: upstream for place, upstream in waits.items() if upstream}
        shown = " -> ".join(nodes[place].slug for place in _cycle(stuck))
        raise FlowError(
            f"flow {flow_name!r}: tasks wait for each other in a circle: {shown}; remove one edge"
        )
    return ordered


def _cycle(waits: dict[int, set[int]]) -> list[int]:
    """One circle among nodes that all wait for others of them, its first node repeated at the end."""
    path = [min(waits)]
    while path[-1] not in path[:-1]:
        path.append(min(waits[path[-1]]))
    return path[path.index(path[-1]) :][::-1]
