"""The fingerprint of a pickle: equal for equal content, whatever process wrote it.

Two pickles of the same flow differ byte by byte: in what happens to be one string object, in the order of
sets, in the random ids that cloudpickle gives to classes. So the opcodes are followed without executing
anything, which gives the graph of what would be built, and that graph is hashed: immutable values by
content, everything else also by identity, as a number in the order of first appearance. Opcodes that are
not understood make the fingerprint that of the raw bytes: unstable, but never equal for different content.
"""

from __future__ import annotations

import hashlib
import pickletools
from collections.abc import Callable, Collection
from typing import Any


class _Node:
    """A value to be built. ``digest`` is set if it is immutable all through: then only content matters."""

    __slots__ = ("digest", "kind", "parts")

    def __init__(self, kind: str, parts: list[_Node], digest: bytes | None = None) -> None:
        self.kind = kind
        self.parts = parts
        self.digest = digest


class _UnknownOpcode(Exception):
    pass


def _leaf(kind: str, content: bytes = b"") -> _Node:
    return _Node(kind, [], hashlib.sha256(kind.encode() + b":" + content).digest())


def _frozen(kind: str, parts: list[_Node]) -> _Node:
    """An immutable compound: by content if all its parts are."""
    digests = [part.digest for part in parts if part.digest is not None]
    if len(digests) < len(parts):
        return _Node(kind, parts)
    if kind == "frozenset":
        digests.sort()
    return _Node(kind, parts, hashlib.sha256(kind.encode() + b"(" + b"".join(digests)).digest())


_MARK = _leaf("mark")
_STATIC_ATTRIBUTES = _leaf("str", b"__static_attributes__").digest
_PACKAGE = _leaf("str", b"__package__").digest
_NONE, _EMPTY = _leaf("none"), _leaf("str", b"")
_SIMPLE = {
    "NONE": lambda arg: _leaf("none"),
    "NEWTRUE": lambda arg: _leaf("true"),
    "NEWFALSE": lambda arg: _leaf("false"),
    "BINFLOAT": lambda arg: _leaf("float", repr(arg).encode()),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "LONG4"), lambda arg: _leaf("int", hex(arg).encode())
    ),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), lambda arg: _leaf("bytes", arg)),
    "BYTEARRAY8": lambda arg: _Node("bytearray", [_leaf("bytes", bytes(arg))]),
    "EMPTY_LIST": lambda arg: _Node("list", []),
    "EMPTY_DICT": lambda arg: _Node("dict", []),
    "EMPTY_SET": lambda arg: _Node("set", []),
    "EMPTY_TUPLE": lambda arg: _frozen("tuple", []),
}
_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NEW = {"REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3}
_ADD_ONE = {"APPEND": 1, "SETITEM": 2}
_ADD_MANY = ("APPENDS", "SETITEMS", "ADDITEMS")


class _Follower:
    """A pickle machine that builds the graph of nodes instead of objects."""

    def __init__(self, neutral: Collection[str]) -> None:
        self._neutral = neutral
        self._stack: list[_Node] = []
        self._memo: dict[int, _Node] = {}
        self.effects: list[_Node] = []  # calls made for their effect only, in order: their values are dropped

    def follow(self, data: bytes) -> _Node:
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, arg)
        raise _UnknownOpcode("no STOP")

    def _step(self, name: str, arg: Any) -> None:
        push: Callable[[_Node], None] = self._stack.append
        if name in ("PROTO", "FRAME"):
            return
        if name in _SIMPLE:
            push(_SIMPLE[name](arg))
        elif name in _STRINGS:
            push(
                _leaf("tracked")
                if arg in self._neutral
                else _leaf("str", arg.encode("utf-8", "surrogatepass"))
            )
        elif name == "MARK":
            push(_MARK)
        elif name in _TUPLES:
            push(_frozen("tuple", self._take(_TUPLES[name])))
        elif name in ("TUPLE", "FROZENSET"):
            push(_frozen(name.lower(), self._take_to_mark()))
        elif name == "STACK_GLOBAL":
            push(_frozen("global", self._take(2)))
        elif name in _NEW:
            push(_Node(name, self._take(_NEW[name])))
        elif name in _ADD_ONE:
            self._add(name, self._take(_ADD_ONE[name]))
        elif name in _ADD_MANY:
            self._add(name, self._take_to_mark())
        elif name == "BUILD":
            self._add(name, [_leaf("build"), *self._take(1)])
        else:
            self._memo_or_pop(name, arg)

    def _memo_or_pop(self, name: str, arg: Any) -> None:
        if name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[arg])
        elif name == "POP":
            self._drop(self._take(1))
        elif name == "POP_MARK":
            self._drop(self._take_to_mark())
        else:
            raise _UnknownOpcode(name)

    def _take(self, count: int) -> list[_Node]:
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _take_to_mark(self) -> list[_Node]:
        start = len(self._stack) - 1
        while self._stack[start] is not _MARK:
            start -= 1
        taken = self._stack[start + 1 :]
        del self._stack[start:]
        return taken

    def _add(self, name: str, parts: list[_Node]) -> None:
        target = self._stack[-1]
        if target.digest is not None:
            raise _UnknownOpcode(f"{name} on a constant")
        target.parts.extend(parts)

    def _drop(self, nodes: list[_Node]) -> None:
        self.effects.extend(node for node in nodes if node.digest is None)


def _parts(node: _Node) -> list[_Node]:
    """The parts in an order that does not depend on hashes of strings."""
    if node.kind == "set" and all(part.digest is not None for part in node.parts):
        return sorted(node.parts, key=lambda part: part.digest or b"")
    if node.kind == "dict":
        parts = list(node.parts)
        for index in range(0, len(parts) - 1, 2):
            key, value = parts[index : index + 2]
            if key.digest == _STATIC_ATTRIBUTES:  # a tuple made from a set by Python 3.13
                parts[index + 1] = _frozen("frozenset", value.parts)
            elif key.digest == _PACKAGE and value.digest == _EMPTY.digest:  # what __main__ has as None
                parts[index + 1] = _NONE
        return parts
    return node.parts


def _hash(roots: list[_Node]) -> str:
    """Hash the graph from its roots on, depth first."""
    digest = hashlib.sha256()
    numbers: dict[int, int] = {}
    pending = roots[::-1]
    while pending:
        node = pending.pop()
        if node.digest is not None:
            digest.update(b"=" + node.digest)
        elif id(node) in numbers:
            digest.update(b"@%d;" % numbers[id(node)])
        else:
            numbers[id(node)] = len(numbers)
            parts = _parts(node)
            digest.update(b"(%s %d;" % (node.kind.encode(), len(parts)))
            pending.extend(reversed(parts))
    return digest.hexdigest()


def fingerprint(data: bytes, neutral: Collection[str] = ()) -> str:
    """The fingerprint of a pickle, in hex; the strings in ``neutral`` count as one and the same."""
    follower = _Follower(neutral)
    try:
        root = follower.follow(data)
        return _hash([root, *follower.effects])
    except (_UnknownOpcode, LookupError, ValueError):
        return hashlib.sha256(b"raw:" + data).hexdigest()
