"""``start``: an agent in the foreground."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from flowagent.cli.session import Command, Session, pass_session
from flowagent.cli.values import duration, pair

if TYPE_CHECKING:
    from flowagent.settings import Settings

PROCESS, DOCKER, KUBERNETES = ("process",), ("docker",), ("kubernetes",)
RUNNERS_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("sandbox", "run_as", "preload", "import_paths"), PROCESS),
    "allow_read": PROCESS + DOCKER,
    **dict.fromkeys(("engine", "volumes", "networks", "pull", "allow_host_config"), DOCKER),
    **dict.fromkeys(("image", "registry_allow", "keep"), DOCKER + KUBERNETES),
    **dict.fromkeys(("context", "namespace", "job_template", "service_account"), KUBERNETES),
    **dict.fromkeys(("image_pull_secrets", "start_timeout"), KUBERNETES),
}
"""Options that not every runner goes by, and those that do."""
CONTAINER_LISTS = ("volumes", "networks", "registry_allow", "allow_host_config", "image_pull_secrets")


def duration_or_none(text: str) -> float | str:
    """Seconds, or the word that the settings take for no limit."""
    return text if text.lower() == "none" else duration(text)


def container_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of agents that run flows in containers and pods."""
    options = [
        click.option("--image", metavar="IMAGE", help="For runs that name none. [python:3.x-slim]"),
        click.option(
            "--volume",
            "volumes",
            multiple=True,
            metavar="SOURCE:TARGET[:ro]",
            help="Mounted into every container, such as ~/.ssh:/root/.ssh:ro. Repeatable.",
        ),
        click.option(
            "--network", "networks", multiple=True, metavar="NAME", help="That containers are in. Repeatable."
        ),
        click.option(
            "--pull", type=click.Choice(["missing", "always", "never"]), help="When to pull images. [missing]"
        ),
        click.option("--no-pull", "pull", flag_value="never", help="The same as --pull never."),
        click.option("--base-url", "engine", metavar="URL", help="The Docker engine. [as docker finds it]"),
        click.option(
            "--registry-allow",
            multiple=True,
            metavar="REGISTRY[/NAME]",
            help="Where flows' images may be from. Repeatable. [anywhere]",
        ),
        click.option(
            "--allow-host-config",
            multiple=True,
            metavar="KEY",
            help="What flows may set in their host_config besides harmless keys. Repeatable.",
        ),
        click.option(
            "--keep", type=click.Choice(["none", "failed"]), help="Containers or jobs to keep. [none]"
        ),
        click.option("--context", metavar="NAME", help="Of the kubeconfig. [the current one]"),
        click.option("--namespace", metavar="NAME", help="Where jobs are made. [the context's]"),
        click.option("--job-template", metavar="FILE", help="What jobs are made from, in YAML or JSON."),
        click.option(
            "--service-account-name", "service_account", metavar="NAME", help="For runs that name none."
        ),
        click.option(
            "--image-pull-secret",
            "image_pull_secrets",
            multiple=True,
            metavar="NAME",
            help="For runs that name none. Repeatable.",
        ),
        click.option("--start-timeout", type=duration, help="How long a pod may take to start. [5m]"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=Command)
@click.option(
    "-l", "--labels", multiple=True, metavar="LABEL[,LABEL...]", help="What this agent carries. Repeatable."
)
@click.option("--name", metavar="NAME", help="The agent's name. [the host's]")
@click.option("--limit", type=click.IntRange(min=1), help="Runs at the same time. [twice the CPUs]")
@click.option(
    "--runner",
    type=click.Choice(["process", "docker", "kubernetes"]),
    help="What runs are executed in. [process]",
)
@click.option("--once", is_flag=True, help="Execute what is due now, then end.")
@click.option(
    "--max-runs", type=click.IntRange(min=1), metavar="COUNT", help="After so many runs, end. [no limit]"
)
@click.option("--idle-exit", type=duration, help="After so long without a run, end. [never]")
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
@click.option(
    "--log-format", type=click.Choice(["auto", "console", "json", "journal"]), help="How this log looks."
)
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
@click.option("--max-source", metavar="SIZE", help="How much one source may hold. [8G]")
@click.option("--ssh-dir", metavar="DIR", help="Where keys, known_hosts and config are. [~/.ssh]")
@click.option(
    "--ssh-client", type=click.Choice(["asyncssh", "openssh"]), help="What speaks ssh. [asyncssh, built in]"
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
@container_options
@click.option("--reserve", metavar="SIZE", help="With less free on its disks, take nothing new. [500M]")
@click.option("--cache-max-size", metavar="SIZE", help="How much to keep of sources and mirrors. [all]")
@click.option(
    "--cache-max-age",
    type=duration_or_none,
    metavar="TIME",
    help="Remove sources and mirrors that were not used for so long, like 7d; or none. [30d]",
)
@click.option(
    "--health-address",
    metavar="ADDRESS",
    help="Serve health and metrics at HOST:PORT, or at the path of a unix socket.",
)
@click.option("--hooks", metavar="DIR", help="Programs that are run around sources and runs.")
@click.option("--hook-timeout", type=duration, help="How long each of them may take. [30s]")
@click.option("--notify", metavar="URL", help="Post to it whenever a run has ended.")
@click.option("--notify-key", metavar="SECRET", help="The name of the secret that signs what is posted.")
@click.option("--tracing", type=click.Choice(["off", "otlp"]), help="Send traces by OpenTelemetry. [off]")
@pass_session
def start(session: Session, /, once: bool, **flags: Any) -> int:
    """Start an agent: it takes the runs whose labels it carries, until it is stopped.

    SIGTERM or Ctrl-C: take nothing new and wait for the runs; a second one cancels them; a third, or SIGQUIT
    at once, leaves them to an agent that is started after this one. SIGHUP: read the configuration again.
    """
    import anyio

    from flowagent.daemon.service import Service

    given = _as_settings(flags)
    names = {option.name: option.opts[0] for option in click.get_current_context().command.params}

    def read() -> Settings:
        settings = session.settings(**given)
        for name, runners in RUNNERS_OF.items():
            if given[name] is not None and settings.runner not in runners:
                _refuse(names[name], runners, settings.runner)
        return settings

    async def serve() -> int:
        return await Service(read, once).run()

    return anyio.run(serve)


def _refuse(option: str, runners: tuple[str, ...], runner: str) -> NoReturn:
    from flowagent.errors import SettingsError

    raise SettingsError(
        f"option {option} is for the runner {' or '.join(runners)}, and this agent's is {runner}; "
        f"leave it out, or give --runner {runners[0]}"
    )


def for_runner(runner: str, where: str) -> Command:
    """The same command for one runner, in the group of its name. ``where``: what it runs flows in."""

    def callback(**options: Any) -> int:
        assert start.callback is not None
        ended: int = start.callback(runner=runner, **options)
        return ended

    return Command(
        "start",
        callback=callback,
        params=[option for option in start.params if option.name != "runner"],
        help=f"Start an agent that runs flows in {where}: start --runner {runner}.",
    )


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
        **{name: flags[name] or None for name in CONTAINER_LISTS},
    }


def _as_paths(values: tuple[str, ...]) -> tuple[Path, ...] | None:
    return tuple(Path(value) for value in values) or None
