"""``cache``: the sources that this machine has materialised."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, json_option, pass_session
from flowagent.cli.values import duration, size

if TYPE_CHECKING:
    from pathlib import Path

    from flowagent.sources import CacheEntry


@click.group()
def cache() -> None:
    """Look after the source cache of this machine."""


def _root(session: Session) -> Path:
    """The directory of the cache, made if it is not there yet."""
    from flowagent.sources import SourceCache

    root = session.settings().sources_dir
    SourceCache(root)
    return root


def _print(entries: list[CacheEntry], empty: str) -> None:
    output.print_table(
        ["source", "backend", "revision", "size", "files", "used", "held"],
        [
            (
                entry.key[:12],
                entry.backend,
                entry.revision,
                output.size(entry.bytes),
                entry.files,
                output.ago(entry.last_used),
                "by runs" if entry.in_use else "",
            )
            for entry in entries
        ],
        empty=empty,
    )


@cache.command(cls=Command)
@json_option()
@pass_session
def ls(session: Session, as_json: bool) -> None:
    """List the sources, least recently used first."""
    from flowagent.sources import collection

    entries = collection.entries(_root(session))
    if as_json:
        output.print_json(entries)
    else:
        _print(entries, empty="the source cache is empty")


@cache.command(cls=Command)
@click.option("--max-size", type=size, metavar="SIZE", help="Keep at most this much, like 2G.")
@click.option(
    "--max-age", type=duration, metavar="TIME", help="Remove what was not used for so long, like 7d."
)
@json_option()
@pass_session
def prune(session: Session, max_size: int | None, max_age: float | None, as_json: bool) -> None:
    """Remove sources that no run holds, least recently used first; without limits, all of those."""
    from flowagent.sources import collection

    if max_size is None and max_age is None:
        max_size = 0
    removed = collection.prune(_root(session), max_size, max_age, keep=0)
    if as_json:
        output.print_json(removed)
    else:
        freed = sum(entry.bytes for entry in removed)
        click.echo(f"removed {_count(removed)}, {output.size(freed)}")


@cache.command(cls=Command)
@json_option()
@pass_session
def verify(session: Session, as_json: bool) -> int:
    """Read every source, and discard those that are not what was published; exit code 1 if there were any."""
    from flowagent.sources import collection

    broken = collection.verify(_root(session))
    if as_json:
        output.print_json(broken)
    elif broken:
        click.echo(
            f"discarded {_count(broken)} that had changed; the next run that needs one fetches it again"
        )
        _print(broken, empty="")
    else:
        click.echo("all sources are as they were published")
    return 1 if broken else 0


def _count(entries: list[CacheEntry]) -> str:
    return "1 source" if len(entries) == 1 else f"{len(entries)} sources"
