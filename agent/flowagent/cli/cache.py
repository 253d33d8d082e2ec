"""``cache``: the sources that this machine has materialised."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, json_option, pass_session
from flowagent.cli.values import duration, size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowagent.settings import Settings
    from flowagent.sources import CacheEntry
    from flowagent.sources.mirrors import MirrorEntry


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


def _print_mirrors(entries: list[MirrorEntry]) -> None:
    rows = [
        (
            entry.key[:12],
            entry.what,
            output.size(entry.bytes),
            output.ago(entry.last_used),
            "by a fetch" if entry.in_use else "",
        )
        for entry in entries
    ]
    if rows:
        output.print_table(["mirror", "of", "size", "used", "held"], rows, empty="")


@cache.command(cls=Command)
@json_option()
@pass_session
def ls(session: Session, as_json: bool) -> None:
    """List the sources, and the mirrors that they come from, least recently used first."""
    from flowagent.sources import collection, mirrors

    entries, mirrored = collection.entries(_root(session)), mirrors.entries(session.settings().mirrors_dir)
    if as_json:
        output.print_json({"sources": entries, "mirrors": mirrored})
    else:
        _print(entries, empty="the source cache is empty")
        _print_mirrors(mirrored)


@cache.command(cls=Command)
@click.option("--max-size", type=size, metavar="SIZE", help="Keep at most this much, like 2G.")
@click.option(
    "--max-age", type=duration, metavar="TIME", help="Remove what was not used for so long, like 7d."
)
@json_option()
@pass_session
def prune(session: Session, max_size: int | None, max_age: float | None, as_json: bool) -> None:
    """Remove sources that no run holds, and mirrors, least recently used first; without limits, all of those.

    Sources go before mirrors: a source is made again without its remote, as long as its mirror is there."""
    from flowagent.sources.upkeep import Upkeep

    if max_size is None and max_age is None:
        max_size = 0
    removed = Upkeep(_root(session), session.settings().mirrors_dir).prune(max_size, max_age)
    if as_json:
        output.print_json({"sources": removed.sources, "mirrors": removed.mirrors})
    else:
        also = f" and {_count(removed.mirrors, 'mirror')}" if removed.mirrors else ""
        click.echo(f"removed {_count(removed.sources)}{also}, {output.size(removed.bytes)}")


@cache.command(cls=Command)
@json_option()
@pass_session
def verify(session: Session, as_json: bool) -> int:
    """Read all sources and mirrors, and discard those that are broken; exit code 1 if there were any."""
    import anyio

    from flowagent.sources import collection, mirrors

    broken = collection.verify(_root(session))
    mirrored = mirrors.entries(session.settings().mirrors_dir)
    keys = anyio.run(_broken_mirrors, session.settings()) if mirrored else []
    gone = [entry for entry in mirrored if entry.key in keys]
    if as_json:
        output.print_json({"sources": broken, "mirrors": gone})
    elif broken or gone:
        counts = " and ".join(
            _count(found, what) for found, what in ((broken, "source"), (gone, "mirror")) if found
        )
        click.echo(f"discarded {counts} that had changed; the next run that needs one fetches it again")
        if broken:
            _print(broken, empty="")
        _print_mirrors(gone)
    else:
        click.echo("all sources are as they were published" + (", and all mirrors whole" if mirrored else ""))
    return 1 if broken or gone else 0


async def _broken_mirrors(settings: Settings) -> list[str]:
    """The keys of those that were discarded."""
    from flowagent.backend import BackendContext
    from flowagent_backends.git import GitBackend

    backend = GitBackend(BackendContext.of(settings))
    try:
        return await backend.verify_mirrors()
    finally:
        await backend.close()


def _count(entries: Sequence[object], what: str = "source") -> str:
    return f"1 {what}" if len(entries) == 1 else f"{len(entries)} {what}s"
