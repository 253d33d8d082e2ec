"""``register``: find flows in files and modules, and register them."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, json_option, pass_session

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from flowagent.models import Registration
    from flowagent.registration import Candidate
    from flowagent.storage import Storage


@dataclass(frozen=True)
class Source:
    """A file or module to look for flows in. ``searched``: nobody named it, so it need not hold any."""

    where: str
    name: str | None = None
    module: bool = False
    searched: bool = False


@click.command(cls=Command)
@click.argument("sources", nargs=-1, metavar="[FILE[:NAME] | DIR | GLOB]...")
@click.option(
    "-m", "modules", multiple=True, metavar="MODULE[:ATTR]", help="An importable module. Repeatable."
)
@click.option("--project", metavar="NAME", help="The project to file the flows under.")
@click.option(
    "--label", "labels", multiple=True, metavar="LABEL", help="A label that agents must carry. Repeatable."
)
@click.option(
    "--git", "from_git", is_flag=True, help="Let agents take the files from the remote of their work tree."
)
@json_option()
@pass_session
def register(
    session: Session,
    sources: tuple[str, ...],
    modules: tuple[str, ...],
    project: str | None,
    labels: tuple[str, ...],
    from_git: bool,
    as_json: bool,
) -> int:
    """Register the flows of files, directories or modules.

    A flow that names no storage is kept where it is: its file, or its module, is read at each run. With
    --git, agents take it from the branch and remote of its work tree. In a directory, all *.py files below it
    that mention flowagent are looked at. Each file is loaded in a process of its own, and one that fails does
    not keep the others from being registered.
    """
    if not sources and not modules:
        raise click.UsageError("Name a file, a directory or, with -m, a module.")
    found = list(dict.fromkeys([*_files(sources), *(Source(name, module=True) for name in modules)]))
    if not found:
        raise click.UsageError(f"There is no Python file that mentions flowagent in {' '.join(sources)}.")
    from flowagent.errors import FlowagentError

    settings = session.settings()
    registered: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []
    for source in found:
        taken = {item["flow"]: item["source"] for item in registered}
        items: list[dict[str, Any]] = []
        error: str | None
        try:
            declared = _declared(source) if from_git else None
            items, error = _in_child(source, taken, (declared, settings, project, labels, session.debug))
        except FlowagentError as problem:
            error = str(problem)
        for item in items:
            registered.append(item)
            if not as_json:
                click.echo(output.on_line(item["summary"]))
        if error:
            errors.append({"source": source.where, "error": error})
            click.echo(f"Error: {output.on_line(error)}", err=True)
    if as_json:
        output.print_json({"registered": registered, "errors": errors})
    elif not registered and not errors:
        click.echo("no flow found in the files that mention flowagent", err=True)
        return 1
    return 1 if errors else 0


# -- what is named -------------------------------------------------------------------------------------


def _files(given: tuple[str, ...]) -> Iterator[Source]:
    for text in given:
        path = Path(text)
        before, _, name = text.rpartition(":")
        if path.is_dir():
            yield from (Source(str(file), searched=True) for file in _below(path))
        elif path.is_file():
            yield Source(os.path.abspath(path))
        elif before and Path(before).is_file():
            yield Source(os.path.abspath(before), name)
        elif glob.has_magic(text):
            matches = sorted(match for match in glob.glob(text, recursive=True) if os.path.isfile(match))
            if not matches:
                raise click.UsageError(f"No file matches {text!r}.")
            yield from (Source(os.path.abspath(match), searched=True) for match in matches)
        else:
            raise click.UsageError(f"There is no file {before or text!r}; a module is registered with -m.")


def _below(directory: Path) -> Iterator[Path]:
    """The Python files below a directory that mention flowagent, in order, without environments."""
    for parent, directories, names in os.walk(os.path.abspath(directory)):
        directories[:] = sorted(
            name
            for name in directories
            if not name.startswith(".") and not os.path.exists(os.path.join(parent, name, "pyvenv.cfg"))
        )
        for name in sorted(names):
            file = Path(parent, name)
            if name.endswith(".py") and _mentions_flowagent(file):
                yield file


def _mentions_flowagent(file: Path) -> bool:
    try:
        return b"flowagent" in file.read_bytes()
    except OSError:
        return True  # then loading it says what is wrong


def _declared(source: Source) -> Storage:
    """The declaration of a file by its work tree; what is not pushed is said."""
    from flowagent.errors import UsageError
    from flowagent_backends.git import worktree

    if source.module:
        raise UsageError(f"--git is for files, and {source.where} is a module; name its file")
    found = worktree.declare(Path(source.where))
    for warning in found.warnings:
        click.echo(f"Warning: {output.on_line(warning)}", err=True)
    return found.storage


# -- each in a process of its own ------------------------------------------------------------------------


def _in_child(
    source: Source, taken: dict[str, str], how: tuple[Any, ...]
) -> tuple[list[dict[str, Any]], str | None]:
    """Load and register a source in a forked process: what user code does to the interpreter stays there,
    and modules of equal names next to different files do not meet."""
    import multiprocessing

    # what each child needs is imported once, here, and shared by the fork
    import flowagent.registration
    import flowagent.runtime.loader
    import flowagent.store.sqlite  # noqa: F401

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_load_and_register, args=(sender, source, taken, *how))
    process.start()
    sender.close()
    items: list[dict[str, Any]] = []
    error: str | None = None
    ended = False
    try:
        while not ended:
            kind, value = receiver.recv()
            if kind == "registered":
                items.append(value)
            else:
                error, ended = value, True
    except EOFError:
        pass
    finally:
        receiver.close()
        process.join()
    if not ended:
        error = f"{source.where} ended the process that loaded it (exit code {process.exitcode})"
    return items, error


def _load_and_register(
    sender: Connection,
    source: Source,
    taken: dict[str, str],
    declared: Storage | None,
    settings: Any,
    project: str | None,
    labels: tuple[str, ...],
    debug: bool,
) -> None:
    import anyio

    from flowagent.cli import progress
    from flowagent.registration import registrar, summary

    os.dup2(2, 1)  # what the user's code prints is not part of our output

    async def register_all() -> None:
        candidates = _candidates(source, taken, declared)
        async with registrar(settings, progress.bar, progress.say) as open_registrar:
            for candidate in candidates:
                registration = await open_registrar.register(candidate, project=project, labels=labels)
                sender.send(("registered", _described(registration, source, summary(registration))))

    try:
        anyio.run(register_all)
    except SystemExit as error:
        sender.send(("end", f"{source.where} called sys.exit({error.code!r}) while it was being loaded"))
    except KeyboardInterrupt:
        sender.send(("end", f"{source.where} was interrupted"))
    except BaseException as error:
        if debug:
            import traceback

            traceback.print_exc()
        sender.send(("end", _in_words(source, error)))
    else:
        sender.send(("end", None))


def _candidates(source: Source, taken: dict[str, str], declared: Storage | None) -> list[Candidate]:
    """The flows of a source. :raises FlowError: there is none, or not the one asked for."""
    from flowagent.errors import UsageError
    from flowagent.registration import Candidate
    from flowagent.runtime import loader
    from flowagent.storage import Local, Module

    default: Storage
    if source.module:
        sys.path.insert(0, os.getcwd())  # as python -m does
        flows, _ = loader.load_module(source.where)
        default = Module(source.where)
        script = None
    else:
        script = Path(source.where)
        module, _ = loader.load_script(source.where, str(script.parent))
        flows = loader.flows_in(module)
        default = declared or Local(path=source.where, stored_as_script=True)
    if source.searched and not flows:
        return []
    # refuses what an agent would refuse: no flow, equal names, not the one asked for
    chosen = loader.choose(flows, source.name or (flows[0].name if flows else None), source.where)
    selected = [chosen] if source.name else flows
    for flow in selected:
        if flow.name in taken:
            raise UsageError(
                f"{source.where}: a flow named {flow.name!r} was registered from {taken[flow.name]} "
                "just now; names must differ: rename one, or name what to register as FILE:NAME"
            )
    return [Candidate(flow, script, default) for flow in selected]


def _described(registration: Registration, source: Source, summary: str) -> dict[str, Any]:
    version = registration.version
    return {
        "flow": version.spec.name,
        "version": version.number,
        "version_id": version.version_id,
        "created": registration.created,
        "labels": list(version.spec.labels),
        "source": source.where,
        "summary": summary,
    }


def _in_words(source: Source, error: BaseException) -> str:
    """One line; for an exception of the user's code with the line of it that raised."""
    from flowagent.errors import FlowagentError

    if isinstance(error, FlowagentError):
        said = str(error)
        return said if source.where in said else f"{source.where}: {said}"
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, ModuleNotFoundError) and error.name == "prefect":
        said += "; import the same from flowagent"
    line = error.lineno if isinstance(error, SyntaxError) else None
    frames = error.__traceback__
    while frames is not None:
        if frames.tb_frame.f_code.co_filename == source.where:
            line = frames.tb_lineno
        frames = frames.tb_next
    return f"{source.where}{f', line {line}' if line else ''}: {said}"
