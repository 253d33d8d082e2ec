"""``doctor``: what flowagent needs on this machine, one line each, with the remedy."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, json_option, pass_session
from flowagent.errors import FlowagentError

if TYPE_CHECKING:
    from flowagent.runners.confinement import Confinement
    from flowagent.settings import Settings


@dataclass(frozen=True)
class Finding:
    """The answer to one question. ``level``: ok, note (works without it), or failed (must be mended)."""

    check: str
    level: str
    detail: str
    remedy: str | None = None


@click.command(cls=Command)
@click.option(
    "--repo", "repos", multiple=True, metavar="URL", help="A Git repository to be read. Repeatable."
)
@json_option()
@pass_session
def doctor(session: Session, repos: tuple[str, ...], as_json: bool) -> int:
    """Check what flowagent needs on this machine; exit code 1 if something that it needs is missing."""
    import anyio

    findings = anyio.run(examine, session.settings(), repos)
    if as_json:
        output.print_json(findings)
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            click.echo(_line(finding, width))
    return 1 if any(finding.level == "failed" for finding in findings) else 0


def _line(finding: Finding, width: int) -> str:
    level = f"{finding.level:<6}"
    if output.with_colour():
        level = click.style(level, fg={"ok": "green", "note": "yellow"}.get(finding.level, "red"))
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    return f"{level}  {finding.check:<{width}}  {output.on_line(finding.detail + remedy)}"


async def examine(settings: Settings, repos: Sequence[str] = ()) -> list[Finding]:
    """All findings, in the order in which they are best read."""
    from flowagent.cli import reach

    here: list[Callable[[Settings], Awaitable[Finding]]] = [_python, _home, _space]
    ours = [_launcher, _sandbox, _limits, _landlock, _bubblewrap]
    there = [reach.git, reach.ssh, reach.docker, reach.kubernetes]
    return [
        *[await check(settings) for check in here],
        *await _store(settings),
        *_named(settings),
        *[await check(settings) for check in (*ours, *there)],
        *[await reach.repository(settings, url) for url in repos],
    ]


async def _python(settings: Settings) -> Finding:
    import flowagent

    return Finding(
        "python", "ok", f"{platform.python_version()} at {sys.executable}, flowagent {flowagent.__version__}"
    )


async def _home(settings: Settings) -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=settings.home, prefix=".doctor-"):
            pass
    except OSError as error:
        return Finding(
            "home",
            "failed",
            f"{settings.home} is not writable: {error.strerror}",
            f"give it to you: chown {os.geteuid()}",
        )
    if settings.home.stat().st_mode & 0o077:
        return Finding(
            "home",
            "note",
            f"{settings.home} can be entered by others",
            f"close it: chmod 700 {settings.home}",
        )
    return Finding("home", "ok", f"{settings.home} is writable")


async def _space(settings: Settings) -> Finding:
    said = []
    for directory in (settings.home, *([settings.cache] if settings.cache else [])):
        try:
            free = shutil.disk_usage(directory).free
        except OSError as error:
            return Finding("disk", "failed", f"{directory}: {error.strerror}", "make that directory")
        if free < settings.reserve:
            wanted = f"agents want {output.size(settings.reserve)} before they take runs"
            remedy = "make room, flowagent cache prune, or lower reserve"
            return Finding("disk", "failed", f"{output.size(free)} free at {directory}, {wanted}", remedy)
        said.append(f"{output.size(free)} free at {directory}")
    return Finding("disk", "ok", ", ".join(said))


async def _store(settings: Settings) -> list[Finding]:
    from flowagent.cli import reach
    from flowagent.store import open_store

    try:
        # one in a file that somebody named is not made on the way: it may be a slip of the pen
        create = "store" not in settings.origins or not settings.store.startswith("sqlite:")
        store = await open_store(settings.store, create=create)
        try:
            await store.ping()
            await store.depart("no agent of this name")  # a write that changes nothing
            fine = f"{store.url} is reachable and writable, its schema is current"
            return [Finding("store", "ok", fine), await reach.clock(store)]
        finally:
            await store.close()
    except FlowagentError as error:
        said = str(error)
        remedy = None if ";" in said else "see that its server runs, and compare: flowagent config show"
        return [Finding("store", "failed", said, remedy)]


def _named(settings: Settings) -> Iterator[Finding]:
    """What settings name, and an agent refuses to start without, or does without: those that are set."""
    from flowagent.daemon.hooks import Hooks
    from flowagent.daemon.log import make_log
    from flowagent.secrets import SecretProvider

    if settings.hooks is not None:
        try:
            Hooks(settings.hooks, settings.hook_timeout, make_log(level="error")).check()
            yield Finding("hooks", "ok", f"those in {settings.hooks} can be used")
        except FlowagentError as error:
            yield Finding("hooks", "failed", str(error))
    if settings.notify_key is not None:
        try:
            SecretProvider(settings.home).get(settings.notify_key)
            yield Finding("notify", "ok", f"the secret {settings.notify_key} is there")
        except FlowagentError as error:
            elsewhere = "unless the agent's service has it as a credential, which this command cannot see"
            yield Finding("notify", "note", f"no agent starts without the key: {error}", elsewhere)
    missing = [str(path) for path in settings.import_paths if not path.is_dir()]
    if missing:
        why = f"nothing is imported from {', '.join(missing)}: no such directory"
        yield Finding("imports", "note", why, "make it, or correct import_paths")
    elif settings.import_paths:
        yield Finding("imports", "ok", "the directories of import_paths are there")


@contextmanager
def _confinement(settings: Settings) -> Iterator[tuple[Path, Confinement]]:
    """A sandbox as an agent with these settings has it, in a directory of its own."""
    from flowagent.runners.confinement import Confinement

    with tempfile.TemporaryDirectory(prefix="flowagent-doctor-") as directory:
        runs = Path(directory) / "runs"
        runs.mkdir()
        yield runs.parent, Confinement(settings, runs)


async def _launcher(settings: Settings) -> Finding:
    from flowagent.runners.process import ProcessRunner

    try:
        with _confinement(settings) as (directory, confinement):
            runner = ProcessRunner(directory, settings.home / "ground", confinement, settings.preload)
            try:
                await runner.prepare()
            finally:
                await runner.close()
    except (FlowagentError, OSError) as error:
        remedy = "see that the disk has room, and that its home is on one that programs may be executed from"
        if "cannot preload" in str(error):
            remedy = f"install what preload names where {sys.executable} finds it, or correct preload"
        return Finding("launcher", "failed", f"flow processes cannot be started: {error}", remedy)
    return Finding("launcher", "ok", "flow processes can be started")


async def _sandbox(settings: Settings) -> Finding:
    try:
        with _confinement(settings) as (_, confinement):
            chosen = f"runs get level {confinement.floor} or better"
            gaps = confinement.gaps
    except FlowagentError as error:
        return Finding("sandbox", "failed", str(error))
    if gaps:
        return Finding("sandbox", "note", f"{chosen}; {'; '.join(gaps)}")
    return Finding("sandbox", "ok", chosen)


async def _limits(settings: Settings) -> Finding:
    from flowagent.runtime import cgroups

    found = cgroups.find()
    words = {cgroups.MEMORY: "memory", cgroups.PIDS: "processes"}
    missing = [word for controller, word in words.items() if not cgroups.limits(found, controller)]
    if missing:
        why = f"no control groups here for {' and '.join(missing)}: watched, several times a second"
        remedy = (
            "have the agent started by systemd: flowagent systemd install, and read what it logs at its start"
        )
        if "memory" in missing:
            remedy += (
                "; the kernel limits each run's memory with systemd 254 or newer, and before that all runs "
            )
            remedy += "together, by MemoryMax= of the unit"
        return Finding("limits", "note", why, remedy)
    return Finding("limits", "ok", f"by control groups: {', '.join(sorted(found))}")


async def _landlock(settings: Settings) -> Finding:
    from flowagent.runtime import landlock

    version = landlock.version()
    if version < 1:
        return Finding("landlock", "note", "not available", "boot a kernel that has it enabled")
    return Finding("landlock", "ok", f"available, version {version}")


async def _bubblewrap(settings: Settings) -> Finding:
    program = shutil.which("bwrap")
    if program is None:
        return Finding(
            "bubblewrap",
            "note",
            "not installed",
            "for sandboxes with own namespaces: apt-get install bubblewrap",
        )
    return Finding("bubblewrap", "ok", program)
