"""What all commands share: the global options, the settings they lead to, and the store."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flowagent.errors import NotFoundError

if TYPE_CHECKING:
    from flowagent.models import Run
    from flowagent.settings import Settings
    from flowagent.store.protocol import Store


T = TypeVar("T")
Job = Callable[["Store"], Coroutine[Any, Any, T]]
"""What a command does with the store."""


class Session:
    """The global options of one command."""

    home: str | None = None
    store: str | None = None
    config: str | None = None
    debug = False

    def settings(self, **flags: Any) -> Settings:
        """The settings of this command; ``flags`` by field name, None for those not given."""
        from pathlib import Path

        from flowagent import settings

        config = Path(self.config) if self.config else None
        return settings.load(config, overrides={"home": self.home, "store": self.store, **flags})

    def with_store(self, job: Job[T], *, waits: bool = False) -> T:
        """Run an async job on the store of the settings; ``waits``: for more than the store's answers.

        A store that somebody named has to be there: a slip of the pen must not make another."""
        from flowagent import store

        settings = self.settings()
        ask = store.run if waits else store.ask
        return ask(settings.store, job, create="store" not in settings.origins)


pass_session = click.make_pass_decorator(Session, ensure=True)


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value and param.name:
        setattr(ctx.find_root().ensure_object(Session), param.name, value)


def global_options(*, hidden: bool = False) -> list[click.Parameter]:
    """The options that every command takes; ``hidden`` from a subcommand's own help."""

    def option(*names: str, **attributes: Any) -> click.Option:
        return click.Option(names, expose_value=False, callback=_remember, hidden=hidden, **attributes)

    return [
        option(
            "--home", metavar="DIR", help="Where flowagent keeps its files. [$FLOWAGENT_HOME; ~/.flowagent]"
        ),
        option("--store", metavar="URL", help="The store. [$FLOWAGENT_STORE; SQLite in the home]"),
        option("--config", metavar="FILE", help="The configuration file. [config.toml in the home]"),
        option(
            "--debug",
            is_flag=True,
            envvar=None if hidden else "FLOWAGENT_DEBUG",
            help="Show tracebacks. [$FLOWAGENT_DEBUG]",
        ),
    ]


class Command(click.Command):
    """A command that takes the global options behind its name, too."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *global_options(hidden=True)]


def json_option(help: str = "Print one JSON document.") -> Callable[[Callable[..., T]], Callable[..., T]]:
    return click.option("--json", "as_json", is_flag=True, help=help)


# -- runs and flows by what users type -------------------------------------------------------------------


async def find_run(store: Store, given: str) -> Run:
    """A run by its id or a prefix of it. :raises NotFoundError: with what was perhaps meant."""
    import difflib

    try:
        return await store.run(given)
    except NotFoundError as error:
        recent = await store.runs(flow=given, limit=1)
        if recent:
            raise NotFoundError(
                f"{given!r} is a flow, not a run; its newest run is {recent[0].id}"
            ) from error
        ids = [run.id for run in await store.runs(limit=200)]
        near = difflib.get_close_matches(given, ids, 1, 0.75)
        if near:
            raise NotFoundError(f"no run has the id {given!r}; did you mean {near[0]}?") from error
        raise


def complete_flow(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of flows for the shell's completion."""

    async def names(store: Store) -> list[str]:
        return [version.spec.name for version in await store.flows()]

    return _complete(ctx, names, incomplete)


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Ids of recent runs for the shell's completion."""

    async def ids(store: Store) -> list[str]:
        return [run.id for run in await store.runs()]

    return _complete(ctx, ids, incomplete)


def _complete(ctx: click.Context, job: Job[list[str]], incomplete: str) -> list[str]:
    try:
        found = ctx.find_root().ensure_object(Session).with_store(job)
    except Exception:
        return []  # there is nowhere to say it: the user is in the middle of a line
    return [item for item in found if item.startswith(incomplete)]


def run_argument(function: Callable[..., T]) -> Callable[..., T]:
    """The argument RUN: an id, or a unique prefix of one."""
    return click.argument("run_id", metavar="RUN", shell_complete=complete_run)(function)
