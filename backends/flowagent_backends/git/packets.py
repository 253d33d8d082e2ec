"""Git's wire format, as far as listing refs needs it (gitprotocol-common, -v2, -pack)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flowagent.errors import BackendError, one_line

FLUSH, DELIMITER = b"0000", b"0001"
AGENT = b"agent=flowagent"
OBJECT_FORMAT = "object-format="
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LENGTH = re.compile(rb"[0-9a-fA-F]{4}")


@dataclass(frozen=True)
class Ref:
    """A ref of a remote. ``commit`` is what an annotated tag points at in the end, ``oid`` for all others."""

    name: str
    oid: str
    commit: str
    target: str | None = None  # of a symbolic ref


@dataclass(frozen=True)
class Advertisement:
    """What a server says first: all refs in protocol 0 and 1, its capabilities in protocol 2."""

    version: int
    capabilities: frozenset[str] = frozenset()
    refs: tuple[Ref, ...] = ()


@dataclass
class Reader:
    """Splits a stream into packets as it comes."""

    _buffer: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """The packets that are complete now; None for a flush. :raises BackendError: this is not git."""
        self._buffer += data
        while len(self._buffer) >= 4:
            head = bytes(self._buffer[:4])
            if not _LENGTH.fullmatch(head):
                raise BackendError(f"it does not speak git: it sent {head!r}")
            length = int(head, 16)
            if length < 4:
                del self._buffer[:4]
                yield None
                continue
            if len(self._buffer) < length:
                return
            yield bytes(self._buffer[4:length])
            del self._buffer[:length]


def packet(data: bytes) -> bytes:
    return b"%04x%s" % (len(data) + 4, data)


def packets(data: bytes) -> list[bytes | None]:
    """The packets of a whole body. :raises BackendError: it ends within one, or is none of git's."""
    reader = Reader()
    found = list(reader.feed(data))
    if reader._buffer:
        raise BackendError("its answer ends too early")
    return found


def list_refs(prefixes: Iterable[str], capabilities: frozenset[str] = frozenset()) -> bytes:
    """The request of protocol 2 for the refs that start with one of ``prefixes``."""
    lines = [packet(b"command=ls-refs\n"), packet(AGENT)]
    lines += [
        packet(name.encode("utf-8", "surrogateescape"))
        for name in capabilities
        if name.startswith(OBJECT_FORMAT)
    ]
    lines += [DELIMITER, packet(b"peel\n"), packet(b"symrefs\n")]
    lines += [packet(b"ref-prefix %s\n" % prefix.encode()) for prefix in prefixes]
    return b"".join([*lines, FLUSH])


def is_usual(said: Advertisement) -> bool:
    """Whether requests need not say how the server names objects."""
    formats = {name for name in said.capabilities if name.startswith(OBJECT_FORMAT)}
    return formats <= {f"{OBJECT_FORMAT}sha1"}


def parse_refs(lines: Iterable[bytes]) -> tuple[Ref, ...]:
    """The refs of an answer to :func:`list_refs`.

    :raises BackendError: the server says no, or this is none."""
    refs = []
    for line in lines:
        if line.startswith(b"ERR "):
            raise BackendError(f"its server says: {one_line(_text(line[4:]))}")
        oid, name, *attributes = [*_text(line).split(" "), ""]
        known = dict(item.partition(":")[::2] for item in attributes)
        if oid == "unborn":
            continue
        refs.append(Ref(name, _oid(oid), _oid(known.get("peeled", oid)), known.get("symref-target")))
    return tuple(refs)


def parse_advertisement(lines: Iterable[bytes | None]) -> Advertisement:
    """:raises BackendError: the server says that it failed, or this is none."""
    present = [line for line in lines if line is not None]
    if present and present[0].startswith(b"# service="):
        present = present[1:]
    if present and present[0].startswith(b"ERR "):
        raise BackendError(f"its server says: {one_line(_text(present[0][4:]))}")
    if present and _text(present[0]) == "version 2":
        return Advertisement(2, frozenset(_text(line) for line in present[1:]))
    if present and _text(present[0]) == "version 1":
        present = present[1:]
    return _advertised(present)


def _advertised(lines: list[bytes]) -> Advertisement:
    """Protocol 0 and 1: refs, the first with the capabilities behind a NUL, peeled tags as NAME^{}."""
    capabilities: frozenset[str] = frozenset()
    oids: dict[str, str] = {}
    for number, line in enumerate(lines):
        if number == 0:
            line, _, rest = line.partition(b"\0")
            capabilities = frozenset(_text(rest).split())
        oid, _, name = _text(line).partition(" ")
        if oid in ("shallow", "") or name == "capabilities^{}":
            continue
        oids[name] = _oid(oid)
    targets = dict(
        item.removeprefix("symref=").partition(":")[::2]
        for item in capabilities
        if item.startswith("symref=")
    )
    refs = tuple(
        Ref(name, oid, oids.get(f"{name}^{{}}", oid), targets.get(name))
        for name, oid in oids.items()
        if not name.endswith("^{}")
    )
    return Advertisement(0, capabilities, refs)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape").rstrip("\n")


def _oid(text: str) -> str:
    if not _OID.fullmatch(text):
        raise BackendError(f"it does not speak git: it sent {text[:60]!r} for a commit")
    return text
