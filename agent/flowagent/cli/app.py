"""The commands by name, and what becomes of their errors."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

import flowagent
from flowagent.cli.session import Session, global_options
from flowagent.errors import FlowagentError, SettingsError

EXIT_ERROR = 1
EXIT_USAGE = 2  # as click has it
EXIT_UNEXPECTED = 70
EXIT_INTERRUPTED = 130

COMMANDS = {
    "demo": ("demo", "See it work: register a flow, start an agent, run it, show the result."),
    "register": ("register", "Register flows from files, directories or modules."),
    "run": ("run", "Ask for a run of a flow."),
    "start": ("start", "Start an agent on this machine."),
    "runs": ("runs", "List runs, newest first."),
    "show": ("runs", "Show all about a run."),
    "result": ("result", "Print or save what a run returned."),
    "logs": ("logs", "Print the output of a run."),
    "cancel": ("control", "End a run."),
    "retry": ("control", "Ask for another run like one that has ended."),
    "explain": ("explain", "Say why a run is where it is, and which agents can take it."),
    "flows": ("flows", "List the registered flows."),
    "agents": ("flows", "List the agents."),
    "drain": ("drain", "Have an agent finish its runs and end."),
    "cache": ("cache", "Look after the source cache of this machine."),
    "secret": ("secret", "Store secrets on this machine."),
    "config": ("config", "See the settings, and where each comes from."),
    "doctor": ("doctor", "Check what flowagent needs on this machine."),
    "docker": ("docker", "Start an agent that runs flows in Docker containers."),
    "kubernetes": ("kubernetes", "Start an agent that runs flows in pods, or print its manifest."),
    "execute": ("execute", "Run one flow here: what agents start in containers."),
    "systemd": ("systemd", "Have systemd run agents on this machine."),
    "completion": ("completion", "Print the completion script of a shell."),
}
"""By name: the module that holds the command, and its line in the help, so that help imports none of them."""


class _Commands(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, line = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"flowagent.cli.{module}"), cmd_name)
        command.short_help = line
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, 2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"There is no command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, params=global_options(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(flowagent.__version__, prog_name="flowagent", message="%(prog)s %(version)s")
def root() -> None:
    """Run Python flows from wherever they are stored.

    Every command takes --json where it prints data, and the options below also behind its name.
    """


def run(args: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. Errors are one line on standard error, unless --debug asks for more."""
    session = Session()
    try:
        code = root.main(args, prog_name="flowagent", standalone_mode=False, obj=session)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except Exception as error:
        return _report(error, session.debug)


def _report(error: BaseException, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]  # the task group it happened in is of no interest
    if isinstance(error, BrokenPipeError):
        return EXIT_ERROR
    if isinstance(error, FlowagentError):
        click.echo(f"Error: {error}", err=True)
        return EXIT_USAGE if isinstance(error, SettingsError) else EXIT_ERROR
    said = " ".join(str(error).split())
    hint = "" if debug else "; run again with --debug to see where"
    click.echo(f"Error: unexpected {type(error).__name__}: {said}{hint}", file=sys.stderr)
    return EXIT_UNEXPECTED
