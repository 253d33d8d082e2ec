"""What storages, run configs and results share: plain data with a JSON form, checked when it is made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from flowagent.flows.errors import FlowError

if TYPE_CHECKING:
    from datetime import timedelta


class Declaration:
    """Plain data of one of several types, equal by value.

    A direct subclass is a family (``Storage``); its subclasses are the types, known by their class names.
    ``fields``, with the family's ``common`` ones, are the names of the attributes that make up the JSON form;
    the constructor takes all of them.
    """

    family: ClassVar[str]
    types: ClassVar[dict[str, type[Declaration]]]
    common: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.fields = (*(name for name in cls.fields if name not in cls.common), *cls.common)
        if Declaration in cls.__bases__:
            cls.types = {}
            return
        known = cls.types.get(cls.__name__)
        if known is not None and known.__module__.startswith("flowagent."):
            raise FlowError(
                f"a {cls.family} named {cls.__name__!r} is built in; give this class another name"
            )
        cls.types[cls.__name__] = cls

    @property
    def type(self) -> str:
        return type(self).__name__

    def to_json(self) -> dict[str, Any]:
        """The JSON form; shares nothing with this object."""
        plain = {"type": self.type, **{name: getattr(self, name) for name in self.fields}}
        copied: dict[str, Any] = json.loads(json.dumps(plain))
        return copied

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Any:
        """The declaration of a JSON form. :raises FlowError: its type or one of its fields is unknown."""
        values = dict(data)
        name = values.pop("type", None)
        found = cls.types.get(name) if isinstance(name, str) else None
        if found is None:
            known = ", ".join(sorted(cls.types))
            raise FlowError(
                f"unknown {cls.family} type {name!r} (known: {known}); import the module that defines it"
            )
        return found(**values)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_json(), sort_keys=True))

    def __repr__(self) -> str:
        given = (f"{name}={getattr(self, name)!r}" for name in self.fields if getattr(self, name))
        return f"{self.type}({', '.join(given)})"


def refuse(what: str, unknown: Iterable[str], instead: Mapping[str, str]) -> None:
    """Raise for keyword arguments that do not exist here, saying what to use instead."""
    for name in unknown:
        hint = instead.get(name, "see its documentation for what it takes")
        raise FlowError(f"{what} has no argument {name!r}; {hint}")


def is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def names(value: Iterable[str] | None, what: str) -> tuple[str, ...]:
    """Labels or secret names: sorted, each once. :raises FlowError: not a collection of names."""
    if value is None or value == ():
        return ()
    if isinstance(value, (str, bytes, Mapping)):
        raise FlowError(f"{what} takes a list of strings; got {value!r}")
    try:
        listed = list(value)
    except TypeError:
        raise FlowError(f"{what} takes a list of strings; got {value!r}") from None
    for item in listed:
        if not is_name(item):
            raise FlowError(f"{what} takes printable, non-empty strings; got {item!r}")
    return tuple(sorted({item.strip() for item in listed}))


def seconds(value: float | timedelta | None, what: str, *, zero: bool = False) -> float | None:
    """A duration in seconds. :raises FlowError: not a finite positive number (or zero, with ``zero``)."""
    if value is None:
        return None
    number: Any = (
        value if isinstance(value, (int, float)) else getattr(value, "total_seconds", lambda: value)()
    )
    valid = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not valid or not (0 <= number < float("inf")) or (number == 0 and not zero):
        raise FlowError(
            f"{what} takes {'zero or ' if zero else ''}a positive number of seconds; got {value!r}"
        )
    return float(number)


def count(value: int, what: str) -> int:
    """A number of times, zero or more. :raises FlowError: it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise FlowError(f"{what} takes zero or a positive whole number; got {value!r}")
    return value


UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(value: int | str, what: str) -> int:
    """A number of bytes, as a number or like ``"512M"``, ``"1.5G"``. :raises FlowError: it is none."""
    number: float = 0
    if isinstance(value, str):
        letter = value.strip().upper().rstrip("B")
        unit = UNITS.get(letter[-1:] if letter[-1:].isalpha() else "")
        with suppress(ValueError):
            number = float(letter.rstrip("KMGT")) * (unit or 0)
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    if not 1 <= number < 1 << 62:
        raise FlowError(f"{what} takes a number of bytes above 0, such as 512M or 2G; got {value!r}")
    return int(number)


def limits(value: Mapping[str, Any] | None, what: str) -> dict[str, float]:
    """Limits by name: sizes, durations and numbers. :raises FlowError: one is unknown or wrong."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FlowError(f"{what} takes a dict such as {{'memory': '2G'}}; got {type(value).__name__}")
    kinds = {
        **dict.fromkeys(SIZES, size),
        **dict.fromkeys(DURATIONS, seconds),
        **dict.fromkeys(NUMBERS, count),
    }
    for name in value:
        if name not in kinds:
            raise FlowError(f"{what} has no {name!r}; known are {', '.join(kinds)}")
    checked: dict[str, float] = {}
    for name, amount in value.items():
        number = kinds[name](amount, f"{what}: {name}")  # type: ignore[operator]
        if not number:
            raise FlowError(f"{what}: {name} has to be above 0; got {amount!r}")
        checked[name] = number
    return checked


SIZES = ("memory", "file_size", "output", "disk")
DURATIONS = ("cpu_time", "wall_time")
NUMBERS = ("processes", "open_files")
"""The limits that there are; what they mean is said in flowagent.runtime.limits."""


def flag(value: bool, what: str) -> bool:
    if not isinstance(value, bool):
        raise FlowError(f"{what} is True or False; got {value!r}")
    return value


def text(value: str | None, what: str) -> str | None:
    """A non-empty string or None. :raises FlowError: something else."""
    if value is not None and not (isinstance(value, str) and value and "\0" not in value):
        raise FlowError(f"{what} takes a non-empty string; got {value!r}")
    return value


def absolute(value: str | os.PathLike[str] | None, what: str) -> str | None:
    """A path made absolute against the present directory, ``~`` expanded."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    checked = text(value, what)
    return None if checked is None else os.path.abspath(os.path.expanduser(checked))


def patterns(value: Iterable[str] | None, what: str) -> tuple[str, ...]:
    """Names and glob patterns of files below a directory, as given. :raises FlowError: one leads out."""
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise FlowError(f"{what} takes a list such as ['sql/*.sql', 'helpers/']; got {value!r}")
    listed = list(value)
    for item in listed:
        parts = item.split("/") if isinstance(item, str) else []
        if not is_name(item) or item.startswith(("/", "~")) or ".." in parts:
            raise FlowError(f"{what} takes paths below the script's directory; got {item!r}")
    return tuple(dict.fromkeys(listed))


AWS_OPTIONS = ("endpoint_url", "region_name", "profile_name", "use_ssl", "verify", "config")
AWS_CONFIG = ("s3", "signature_version")
_SECRET_OPTIONS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
_SECRET_UPLOADS = ("SSECustomerKey", "CopySourceSSECustomerKey")


def aws_options(value: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """Options of a client of AWS. :raises FlowError: one is unknown, or a secret."""
    checked = _options(value, what)
    for name in _SECRET_OPTIONS:
        if name in checked:
            raise FlowError(
                f"{what}: {name} would be stored with the flow; put credentials where AWS' tools look for "
                "them: a profile, AWS_ variables, or the secret AWS_CREDENTIALS"
            )
    _only(AWS_OPTIONS, checked, what)
    config = checked.get("config", {})
    if not isinstance(config, dict):
        raise FlowError(f"{what}: config takes a dict such as {{'s3': {{'addressing_style': 'path'}}}}")
    _only(AWS_CONFIG, config, f"{what}: config")
    return checked


def upload_options_of(value: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """Options of an upload. :raises FlowError: one is a secret."""
    checked = _options(value, what)
    for name in _SECRET_UPLOADS:
        if name in checked:
            raise FlowError(
                f"{what}: {name} would be stored with the flow; use ServerSideEncryption='aws:kms'"
            )
    return checked


def _only(known: Iterable[str], given: Iterable[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise FlowError(f"{what} has no {name!r}; known are {', '.join(known)}")


def _options(value: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise FlowError(f"{what} takes a dict; got {type(value).__name__}")
    checked: dict[str, Any] = plain(dict(value or {}), what)
    return checked


def plain(value: Any, what: str) -> Any:
    """A deep copy of JSON data. :raises FlowError: ``json.dumps`` does not take it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise FlowError(f"{what} takes JSON data only: {error}") from None
