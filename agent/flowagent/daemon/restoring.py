"""What a run that repeats another one takes over from it: the results of the tasks that completed.

A task of a graph is taken over if all that it depends on is, so that its arguments are what they were. A
task that a function calls is known again by the digest of its arguments.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from flowagent.backend import Backends
from flowagent.daemon.log import Log
from flowagent.daemon.shipping import NOTHING
from flowagent.errors import BackendError
from flowagent.models import FlowSpec, Json, Run, State, TaskRun
from flowagent.runtime.rundir import RunDirectory
from flowagent.store.protocol import Store


async def results_of_repeated(store: Store, run: Run, spec: FlowSpec) -> dict[str, Json]:
    """References by task, from the run that this one repeats. There are none if it completed: then it is
    repeated as a whole."""
    if run.retry_of is None:
        return {}
    repeated = await store.run(run.retry_of)
    if repeated.state is State.COMPLETED or not repeated.attempt:
        return {}
    tasks = {task.task: task for task in await store.task_runs(repeated.id, repeated.attempt)}
    return choose(spec, tasks, ())


async def restore(
    backends: Backends, run: Run, spec: FlowSpec, found: Mapping[str, Json], directory: RunDirectory, log: Log
) -> dict[str, Json]:
    """Fetch results into a run directory; those that are there now.

    What cannot be had any more, and what depends on it, is left out.

    :raises BackendError: one cannot be had at the moment"""
    assert run.retry_of is not None
    fetched: dict[str, str] = {}
    lost: set[str] = set()
    for number, (slug, reference) in enumerate(found.items()):
        if NOTHING in reference:
            continue
        name = f"restored-{number}"
        path = Path(directory.results, name)
        try:
            await backends.get(reference["storage"]).get(reference, path)
            os.chmod(path, 0o644)  # flows may run as another user; nobody else comes this far
            fetched[slug] = name
        except BackendError as error:
            if error.retryable:
                raise
            log.warning("a result is lost, its task runs again", task=slug, error=str(error))
            lost.add(slug)
    tasks = {
        slug: TaskRun(run.retry_of, 0, slug, "completed", result=reference)
        for slug, reference in found.items()
    }
    kept = choose(spec, tasks, lost) if lost else dict(found)
    index = {
        slug: {
            "file": fetched.get(slug),
            "serializer": reference.get("serializer"),
            "inputs": reference.get("inputs"),
        }
        for slug, reference in kept.items()
    }
    directory.write_restored(run.retry_of, index)
    return kept


def choose(spec: FlowSpec, tasks: Mapping[str, TaskRun], lost: Collection[str]) -> dict[str, Json]:
    """The results that can be taken over, by task."""
    kept = {
        slug: task.result
        for slug, task in tasks.items()
        if slug and slug not in lost and task.state == "completed" and _usable(task.result)
    }
    if spec.kind == "function":
        return {slug: reference for slug, reference in kept.items() if "inputs" in reference}
    settled: set[str] = set()
    chosen: dict[str, Json] = {}
    for node in spec.tasks:
        slug = node["slug"]
        if not settled.issuperset(node["upstream"]):
            continue
        children = [other for other in tasks if other.startswith(f"{slug}[")]
        chosen.update({other: kept[other] for other in (slug, *children) if other in kept})
        own = tasks.get(slug)
        whole = own is not None and own.state == "completed" and kept.keys() >= set(children)
        if slug in kept or (children and whole) or (own is not None and own.state == "skipped"):
            settled.add(slug)
    return chosen


def _usable(reference: Json) -> bool:
    return isinstance(reference, dict) and (NOTHING in reference or "storage" in reference)
