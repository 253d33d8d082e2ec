"""``demo``: the main job from end to end, with a flow that comes along."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, pass_session
from flowagent.errors import FlowagentError

if TYPE_CHECKING:
    from flowagent.registration import Candidate
    from flowagent.settings import Settings
    from flowagent.store.protocol import Store

DEADLINE = 60.0
"""Seconds after which something must be wrong."""
STOP_DEADLINE = 15.0
LOG = "demo-agent.log"


@click.command(cls=Command)
@click.option("--who", default="world", show_default=True, help="Whom the flow greets.")
@click.option("--keep", is_flag=True, help="Leave the temporary home, to look at what there is.")
@pass_session
def demo(session: Session, who: str, keep: bool) -> int:
    """See it work: register a flow, start an agent, run it, follow its output, show the result.

    All of it is in a temporary home, unless --home names another.
    """
    from flowagent import store

    # so that the agent is stopped and the home removed also when this process is told to end
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with _home(session, keep) as (settings, environment):
        with _agent(environment, settings.home / LOG) as agent:
            code = store.run(settings.store, lambda opened: _show_off(settings, opened, agent, who))
        _say("the agent has stopped")
        if keep or session.home is not None:
            _say(f"look around with: flowagent --home {settings.home} runs")
    return code


@contextmanager
def _home(session: Session, keep: bool) -> Iterator[tuple[Settings, dict[str, str]]]:
    """The settings of the demo, and the environment that leads an agent to the same."""
    environment = dict(os.environ)
    temporary = None
    if session.home is None:
        temporary = tempfile.mkdtemp(prefix="flowagent-demo-")
        # what is set for this user's own agents has no place in it
        environment = {
            name: value for name, value in environment.items() if not name.startswith("FLOWAGENT_")
        }
    try:
        from flowagent import settings as settings_of

        config = Path(session.config) if session.config else None
        overrides = {"home": temporary or session.home, "store": session.store}
        settings = settings_of.load(config, environment, overrides)
        environment.update(FLOWAGENT_HOME=str(settings.home), FLOWAGENT_STORE=settings.store)
        yield settings, environment
    finally:
        if temporary is not None and not keep:
            shutil.rmtree(temporary, ignore_errors=True)
            _say(f"{temporary} is removed; with --keep it stays")


@contextmanager
def _agent(environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real agent in a process of its own; it is stopped in good order, whatever happens."""
    command = [
        sys.executable,
        "-m",
        "flowagent",
        "start",
        "--name",
        "demo",
        "--labels",
        "demo",
        "--drain",
        "5s",
    ]
    with open(log, "wb") as file:
        agent = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    _say(f"an agent that carries the label demo is starting (pid {agent.pid}, its log is {log})")
    try:
        yield agent
    finally:
        agent.send_signal(signal.SIGTERM)
        try:
            agent.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


async def _show_off(settings: Settings, store: Store, agent: subprocess.Popen[bytes], who: str) -> int:
    from flowagent.backend import BackendContext, Backends
    from flowagent.registration import Registrar, summary
    from flowagent.submission import submit

    backends = Backends(BackendContext.of(settings))
    registration = await Registrar(store, backends).register(_candidate(), labels=["demo"])
    _say(summary(registration))
    run, _ = await submit(store, registration.version.spec.name, {"who": who})
    _say(f"run {run.id} is asked for, with who={json.dumps(who)}; its output:")
    code = await _watch(store, run.id, agent, settings.home / LOG)
    if code:
        return code
    for task in await store.task_runs(run.id, 1):
        if task.task.startswith("greet") and isinstance(task.result, dict) and "path" in task.result:
            with tempfile.TemporaryDirectory(prefix="flowagent-") as directory:
                file = Path(directory) / "result"
                await backends.get(task.result["storage"]).get(task.result, file)
                value = json.loads(file.read_bytes())
            _say(f"the result is {output.on_line(json.dumps(value))}, kept in {task.result['path']}")
            return 0
    click.echo("Error: the run has completed and its result was not kept; see the agent's log", err=True)
    return 1


async def _watch(store: Store, run_id: str, agent: subprocess.Popen[bytes], log: Path) -> int:
    """The run's exit code. :raises FlowagentError: its agent is gone, or it takes too long."""
    import anyio

    from flowagent.cli.run import watch_run

    async def mind_the_agent() -> None:
        pidfd = os.pidfd_open(agent.pid)
        try:
            await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        said = (await anyio.Path(log).read_text(errors="replace")).strip()
        raise FlowagentError(
            f"the agent has ended with exit code {agent.wait()}: {said.rpartition(chr(10))[2]}"
        )

    try:
        with anyio.fail_after(DEADLINE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(mind_the_agent)
                code = await watch_run(store, run_id)
                tasks.cancel_scope.cancel()
    except TimeoutError:
        raise FlowagentError(f"the run has not ended within {DEADLINE:.0f} s; see {log}") from None
    return code


def _candidate() -> Candidate:
    """The bundled flow, a script that stays where it is installed."""
    import flowagent
    from flowagent.registration import Candidate
    from flowagent.runtime import loader
    from flowagent.storage import Local

    script = Path(flowagent.__file__).parent / "demo" / "hello.py"
    module, _ = loader.load_script(str(script), str(script.parent))
    flow = loader.choose(loader.flows_in(module), None, str(script))
    return Candidate(flow, script, Local(path=str(script), stored_as_script=True))


def _say(text: str) -> None:
    click.echo(click.style("● ", fg="green") + text if output.with_colour() else f"* {text}")
    sys.stdout.flush()
