"""The kinds of values that settings have.

Each is a function that takes what a file, a variable or a flag says, and returns the value. It raises
``ValueError`` with what is expected, in words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowagent import labels as label_names
from flowagent.errors import UsageError, one_line
from flowagent.flows import declarations
from flowagent.flows.errors import FlowError

_HOST = re.compile(r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
LIMITS = (*declarations.SIZES, *declarations.DURATIONS, *declarations.NUMBERS)
"""What the setting max can limit."""


def string(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty string")
    return value


def store(value: Any) -> str:
    """The URL of a store, as far as it can be told by its looks."""
    expected = "sqlite:////absolute/path or postgresql://user:password@host/database"
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(expected)
    scheme, separator, rest = value.partition("://")
    fits = {
        "sqlite": rest.startswith("/") and rest not in ("/", "/:memory:"),
        "postgresql": True,  # what is left out is in PG* variables
        "postgres": True,
    }
    if not separator or not fits.get(scheme.lower(), False):
        raise ValueError(expected)
    return value


def choice(*choices: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return value.lower()

    return read


def boolean(value: Any) -> bool:
    words = {
        "true": True,
        "1": True,
        "yes": True,
        "on": True,
        "false": False,
        "0": False,
        "no": False,
        "off": False,
    }
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("true or false")


def count(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number from 1 on")
    return value


def seconds(value: Any) -> float:
    expected = "a number of seconds above 0"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(expected)
    try:
        number = float(value)
    except ValueError:
        raise ValueError(expected) from None
    if not 0 < number < 1e9:
        raise ValueError(expected)
    return number


def labels(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return label_names.parse([value]) if value.strip() else ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of strings")
    return label_names.parse(value)


def environment(value: Any) -> dict[str, str]:
    """A table of strings, or ``KEY=VALUE`` strings: a list of them, or one with commas between."""
    expected = "a table of strings, or KEY=VALUE"
    if isinstance(value, str):
        value = value.split(",") if value.strip() else []
    if isinstance(value, (list, tuple)):
        if not all(isinstance(item, str) and item.partition("=")[0] and "=" in item for item in value):
            raise ValueError(expected)
        value = dict(item.split("=", 1) for item in value)
    if not isinstance(value, Mapping) or not all(isinstance(item, str) for item in (*value, *value.values())):
        raise ValueError(expected)
    for key, text in value.items():
        if not key or "=" in key or "\0" in key + text:
            raise ValueError(expected)
    return dict(value)


def strings(value: Any) -> tuple[str, ...]:
    """A list, or one with commas between."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise ValueError("a list of strings")
    return tuple(value)


def hosts(value: Any) -> tuple[str, ...]:
    """A list of ``HOST`` or ``HOST:PORT``, or one with commas between; in lower case."""
    found = strings(value)
    if not all(_HOST.fullmatch(item) for item in found):
        raise ValueError("a list of HOST or HOST:PORT, without https://,")
    return tuple(dict.fromkeys(item.lower() for item in found))


def modules(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(item, str) and all(part.isidentifier() for part in item.split(".")) for item in value
    ):
        raise ValueError("a list of names of modules")
    return tuple(dict.fromkeys(value))


def limits(value: Any) -> dict[str, float | None]:
    """A table of limits, or ``NAME=VALUE`` strings: a list of them, or one with commas between. The value
    ``none`` takes a default away."""
    if not isinstance(value, Mapping):
        value = environment(value)
    for name in value:
        if name not in LIMITS:
            from flowagent.hints import near  # with it comes difflib

            raise UsageError(f"there is no limit {one_line(repr(name), 100)}{near(name, LIMITS)}")
    unlimited = [name for name, text in value.items() if isinstance(text, str) and text.lower() == "none"]
    given = {name: _number(text) for name, text in value.items() if name not in unlimited}
    try:
        return {**declarations.limits(given, "max"), **dict.fromkeys(unlimited)}
    except FlowError as error:
        raise UsageError(str(error).removeprefix("max: ")) from None


def _number(text: Any) -> Any:
    """A number that came as text; sizes such as 2G stay what they are."""
    if isinstance(text, str):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def path(value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise ValueError("a path")
    return Path(value).expanduser().absolute()


def paths(value: Any) -> tuple[Path, ...]:
    if isinstance(value, str):
        value = [item for item in value.split(os.pathsep) if item]
    if not isinstance(value, (list, tuple)):
        raise ValueError("a list of paths")
    return tuple(path(item) for item in value)


def size(value: Any) -> int:
    try:
        return declarations.size(_number(value), "it")
    except FlowError:
        raise ValueError("a number of bytes such as 512M or 8G") from None


def address(value: Any) -> str:
    """``HOST:PORT``, ``[IPv6]:PORT``, or the absolute path of a unix socket."""
    expected = "HOST:PORT, or the absolute path of a unix socket"
    if not isinstance(value, str):
        raise ValueError(expected)
    value = value.removeprefix("unix:")
    if not value.startswith("/"):
        host, _, port = value.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not host or (":" in host and not bracketed) or not (port.isascii() and port.isdigit()):
            raise ValueError(expected)
        if int(port) > 65535:
            raise ValueError(expected)
    return str(value)


def web_address(value: Any) -> str:
    """A URL that can be posted to, without a password in it."""
    from urllib.parse import urlsplit

    expected = "an http:// or https:// URL without user and password"
    if not isinstance(value, str) or any(character <= " " for character in value):
        raise ValueError(expected)
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        raise ValueError(expected) from None
    if not valid or "@" in parts.netloc:
        raise ValueError(expected)
    return value


def secret_name(value: Any) -> str:
    if not isinstance(value, str) or not value.isascii() or not value.isidentifier():
        raise ValueError("the name of a secret")
    return value


def ssh_hosts(value: Any) -> dict[str, dict[str, Any]]:
    """Tables by host, or by host/path/of/repository."""
    if not isinstance(value, Mapping):
        raise ValueError('tables such as [ssh."github.com/org/repo"]')
    for name, table in value.items():
        lines = table.get("known_hosts", []) if isinstance(table, Mapping) else None
        keys = {key: item for key, item in table.items() if key != "known_hosts"} if lines is not None else {}
        texts = [*keys.values(), *lines] if isinstance(lines, list) else [None]
        if (
            not set(keys) <= {"key", "key_secret"}
            or len(keys) > 1
            or not all(isinstance(t, str) for t in texts)
        ):
            raise ValueError(
                f'in [ssh."{one_line(name)}"] key or key_secret, a string, and known_hosts, a list of lines,'
            )
    return {name.removesuffix(".git"): dict(table) for name, table in value.items()}
