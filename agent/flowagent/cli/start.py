"""``start``: an agent in the foreground."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowagent.cli.session import Command, Session, pass_session
from flowagent.cli.values import duration, pair

if TYPE_CHECKING:
    from flowagent.daemon.agent import Agent
    from flowagent.daemon.log import Log
    from flowagent.settings import Settings
    from flowagent.store.protocol import Store

SLOW = 1.5
"""Seconds after which a store that does not answer is spoken of."""


@click.command(cls=Command)
@click.option(
    "-l", "--labels", multiple=True, metavar="LABEL[,LABEL...]", help="What this agent carries. Repeatable."
)
@click.option("--name", metavar="NAME", help="The agent's name. [the host's]")
@click.option("--limit", type=click.IntRange(min=1), help="Runs at the same time. [twice the CPUs]")
@click.option("--once", is_flag=True, help="Execute what is due now, then end.")
@click.option(
    "--env",
    multiple=True,
    type=pair,
    metavar="KEY=VALUE",
    help="An environment variable of every flow. Repeatable.",
)
@click.option(
    "--import-path", "import_paths", multiple=True, metavar="DIR", help="Where flows import from. Repeatable."
)
@click.option(
    "--hostname-label/--no-hostname-label", default=None, help="Carry the host's name as a label. [yes]"
)
@click.option(
    "--require-labels", is_flag=True, default=None, help="Leave runs without labels to other agents."
)
@click.option("--log-format", type=click.Choice(["auto", "console", "json"]), help="How this log looks.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="How much it says."
)
@click.option("--lease", type=duration, help="How long a run is leased; it is renewed in time. [30s]")
@click.option("--poll", type=duration, help="How often to look for runs if nothing wakes it. [5s]")
@click.option("--grace", type=duration, help="From SIGTERM to SIGKILL when a flow is stopped. [10s]")
@click.option("--drain", type=duration, help="How long a stopping agent waits for its runs. [5m]")
@click.option(
    "--sandbox",
    type=click.Choice(["auto", "process", "landlock", "namespace"]),
    help="The weakest isolation that a run gets. [auto: the best that this machine has]",
)
@click.option(
    "--allow-read", multiple=True, metavar="PATH", help="Of what is closed, what flows may read. Repeatable."
)
@click.option(
    "--allow-write",
    multiple=True,
    metavar="PATH",
    help="Outside of their own directories, what flows may write. Repeatable.",
)
@click.option("--run-as", metavar="USER", help="The user that flows run as, if the agent is root.")
@click.option(
    "--preload", multiple=True, metavar="MODULE", help="Import it once, before runs are forked. Repeatable."
)
@click.option(
    "--max",
    multiple=True,
    type=pair,
    metavar="LIMIT=VALUE",
    help="What a run may use: memory=2G, processes, open_files, file_size, cpu_time, wall_time, output, disk;"
    " none lifts a default. Repeatable.",
)
@pass_session
def start(session: Session, /, once: bool, **flags: Any) -> None:
    """Start an agent: it takes the runs whose labels it carries, until it is stopped.

    SIGTERM or Ctrl-C: take nothing new and wait for the runs; a second one cancels them; a third leaves them.
    """
    import anyio

    from flowagent.daemon.log import make_log

    settings = session.settings(**_as_settings(flags))
    log = make_log(settings.log_format, settings.log_level)
    anyio.run(serve, settings, log, once)


def _as_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags by field of the settings; what was not given is None, so that file and environment count."""
    return {
        **flags,
        "labels": flags["labels"] or None,
        "env": dict(flags["env"]) or None,
        "import_paths": _as_paths(flags["import_paths"]),
        "allow_read": _as_paths(flags["allow_read"]),
        "allow_write": _as_paths(flags["allow_write"]),
        "preload": flags["preload"] or None,
        "max": dict(flags["max"]) or None,
    }


def _as_paths(values: tuple[str, ...]) -> tuple[Path, ...] | None:
    return tuple(Path(value) for value in values) or None


async def serve(settings: Settings, log: Log, once: bool = False) -> None:
    """Run one agent until a signal has stopped it. :raises FlowagentError: it cannot start."""
    import anyio

    from flowagent.daemon.agent import Agent

    agent: Agent | None = None
    opening = anyio.CancelScope()

    async def obey() -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                if agent is None:
                    opening.cancel()
                else:
                    agent.stop()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(obey)
        store = None
        with opening:
            store = await _open(settings, log)
        if store is not None:
            try:
                agent = Agent(settings, store, log, runs_once=once)
                await agent.run()
            finally:
                with anyio.CancelScope(shield=True):
                    await store.close()
        tasks.cancel_scope.cancel()


async def _open(settings: Settings, log: Log) -> Store:
    """Open the store, however long it is away, and say so soon."""
    import anyio

    from flowagent.daemon.patience import patiently
    from flowagent.store import open_store

    async def speak_of_it() -> None:
        await anyio.sleep(SLOW)
        log.warning("the store does not answer yet; still trying")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(speak_of_it)
        store = await patiently(lambda: open_store(settings.store), log, "opening the store")
        tasks.cancel_scope.cancel()
    return store
