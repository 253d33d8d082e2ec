"""``result``: print or save what a run or one of its tasks returned."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, find_run, json_option, pass_session, run_argument
from flowagent.errors import FlowagentError, NotFoundError, UsageError

if TYPE_CHECKING:
    from flowagent.models import Json, Run, TaskRun
    from flowagent.settings import Settings
    from flowagent.store.protocol import Store

VALUES = {
    "builtins": {"bytearray", "complex", "frozenset", "range", "set", "slice"},
    "collections": {"OrderedDict"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "uuid": {"UUID"},
}
"""What a pickle may make without the user's word: values, none of which does anything when it is made."""


@click.command(cls=Command)
@run_argument
@click.argument("task", required=False)
@click.option(
    "-o", "--output", "target", metavar="FILE", help="Save it as it is stored; to standard output with -."
)
@click.option("--attempt", type=click.IntRange(min=1), help="Of which attempt. [the newest]")
@click.option(
    "--trust", is_flag=True, help="Load any pickle. It can do here whatever you can: know who made it."
)
@json_option("Print the value, and where it is kept, as one JSON document.")
@pass_session
def result(
    session: Session,
    run_id: str,
    task: str | None,
    target: str | None,
    attempt: int | None,
    trust: bool,
    as_json: bool,
) -> None:
    """Print or save what a run, or one of its tasks, returned.

    RUN is an id, or a unique beginning of one; TASK is a name of a task as flowagent show prints it. A
    pickle of more than plain data is loaded with --trust only.
    """

    async def find(store: Store) -> tuple[Run, TaskRun]:
        run = await find_run(store, run_id)
        tasks = await store.task_runs(run.id, attempt or run.attempt) if run.attempt else []
        return run, _chosen(run, tasks, task)

    import anyio

    run, found = session.with_store(find)
    reference = _reference(run, found)
    saved = Path(target) if target not in (None, "-") else None
    value = None
    if "none" not in reference:
        # beside the file it becomes, so that it is there whole or not at all
        beside = _directory_of(saved) if saved is not None else Path(tempfile.gettempdir())
        with _written(beside), tempfile.TemporaryDirectory(prefix=".flowagent-", dir=beside) as directory:
            file = Path(directory, "result")
            anyio.run(_fetch, session.settings(), reference, file)
            if saved is not None:
                os.replace(file, saved)
            elif target is not None:
                with file.open("rb") as source:
                    shutil.copyfileobj(source, sys.stdout.buffer)
            else:
                value = _load(reference, file.read_bytes(), trust)
    elif target is not None:
        raise UsageError(f"{_named(found)} of run {run.id} returned None; there is nothing to save")
    if target is None:
        _print(run, found, value, as_json)


async def _fetch(settings: Settings, reference: dict[str, Json], file: Path) -> None:
    from flowagent.backend import BackendContext, Backends
    from flowagent.cli import progress
    from flowagent.settings import hostname

    backends = Backends(BackendContext(settings.home, hostname(), progress=progress.bar))
    try:
        await backends.get(reference["storage"]).get(reference, file)
    finally:
        await backends.close()


@contextmanager
def _written(directory: Path) -> Iterator[None]:
    """:raises UsageError: nothing can be written to the directory, or not so much."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(
            f"the result cannot be written to {directory}: {error.strerror or error}; "
            "free space there, or name a file elsewhere with --output"
        ) from error


def _directory_of(saved: Path) -> Path:
    if saved.is_dir() or not saved.absolute().parent.is_dir():
        raise UsageError(f"{saved} cannot be written: name a file in a directory that exists")
    return saved.absolute().parent


# -- which ---------------------------------------------------------------------------------------------


def _chosen(run: Run, tasks: list[TaskRun], name: str | None) -> TaskRun:
    """The task that was asked for; without a name the flow itself, else the only one with a result.

    :raises NotFoundError: there is none, or more than one"""
    if name is not None:
        for task in tasks:
            if task.task == name:
                return task
        near = output.on_line(", ".join(task.task for task in tasks if task.task)[:500]) or "none"
        raise NotFoundError(f"run {run.id} has no task {name!r}; it has: {near}")
    kept = [task for task in tasks if isinstance(task.result, dict) and "none" not in task.result]
    whole = [task for task in tasks if not task.task and task.result] or kept
    if len(whole) == 1:
        return whole[0]
    if not whole:
        raise NotFoundError(
            f"run {run.id} of {output.on_line(run.flow_name)} has kept no result; "
            "give its flow a result=, and see: flowagent show " + run.id
        )
    names = output.on_line(", ".join(task.task for task in whole))
    raise NotFoundError(f"run {run.id} has results of several tasks, name one of them: {names[:500]}")


def _named(task: TaskRun) -> str:
    return f"task {output.on_line(task.task)}" if task.task else "the flow"


def _reference(run: Run, task: TaskRun) -> dict[str, Json]:
    reference = task.result
    if not isinstance(reference, dict):
        why = f"it is {task.state}" if task.state != "completed" else "its flow has no result="
        raise NotFoundError(f"{_named(task)} of run {run.id} has no result that was kept: {why}")
    if "error" in reference:
        raise NotFoundError(
            f"the result of {_named(task)} of run {run.id} was not kept: {output.on_line(reference['error'])}"
        )
    return reference


# -- what it is ----------------------------------------------------------------------------------------


class _ValuesOnly(pickle.Unpickler):
    """Loads plain data; whatever else a pickle names is refused before anything of it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if name in VALUES.get(module, ()):
            return super().find_class(module, name)
        raise UsageError(
            f"the result holds {output.on_line(f'{module}.{name}')}, and loading such pickles can execute "
            "anything; add --trust if you know who made it, or save it with --output FILE"
        )


def _load(reference: dict[str, Json], data: bytes, trust: bool) -> Any:
    from flowagent.flows.results import PickleSerializer, serializer_named

    serializer = serializer_named(reference["serializer"])
    try:
        if isinstance(serializer, PickleSerializer) and not trust:
            return _ValuesOnly(io.BytesIO(data)).load()
        return serializer.loads(data)
    except FlowagentError:
        raise
    except Exception as error:
        said = output.on_line(f"{type(error).__name__}: {error}")
        raise UsageError(f"the result cannot be loaded here: {said}; save it with --output FILE") from error


def _print(run: Run, task: TaskRun, value: Any, as_json: bool) -> None:
    if as_json:
        output.print_json(
            {
                "run": run.id,
                "attempt": task.attempt,
                "task": task.task,
                "result": task.result,
                "value": value if _is_json(value) else repr(value),
            }
        )
        return
    if isinstance(value, str):
        text = value
    elif hasattr(value, "to_string"):  # a table of pandas
        text = value.to_string()
    else:
        from pprint import pformat

        text = pformat(value, width=110, sort_dicts=False)
    click.echo(output.visible(text))


def _is_json(value: Any) -> bool:
    import json

    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
