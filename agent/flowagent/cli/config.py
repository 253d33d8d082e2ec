"""``config``: the settings that a command or an agent here would go by, and where each was set."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, json_option, pass_session

MASK = "***"
SECRETIVE = re.compile(
    r"pass|secret|token|key|credential|auth|pwd|cookie|signature|(?<![a-z])sig(?![a-z])", re.IGNORECASE
)
"""Names whose values are not shown."""
_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_URL = re.compile(r"([a-z][a-z0-9+.-]{0,40}://)(\S+)", re.IGNORECASE)
_PAIR = re.compile(r"""(?<![\w.%+-])([\w.%+-]+)["']?\s*=\s*""")
_PAIR_VALUE = re.compile(rf"{_QUOTED}|[^&\s]*")
_MEMBER = re.compile(r"""(?<=["'])([\w.-]+)\\*["']\s*:\s*""")
_MEMBER_VALUE = re.compile(rf"{_QUOTED}|[^,}}\]]*")
_HEADER = re.compile(r"(?<![\w-])([\w-]+):[ \t]+")
_HEADER_VALUE = re.compile(r"""[^\n"']*""")
_SCHEME = re.compile(r"\b(bearer|basic)\s+[^\s\"',;]+", re.IGNORECASE)


@click.group()
def config() -> None:
    """See the configuration."""


@config.command(cls=Command)
@json_option()
@pass_session
def show(session: Session, as_json: bool) -> None:
    """Print each setting, its value and where it was set; secrets are masked.

    Flags of start are not seen here: they come last, and count for that agent only.
    """
    from dataclasses import fields

    settings = session.settings()
    shown = [
        {
            "key": item.name,
            "value": masked(item.name, getattr(settings, item.name)),
            "origin": settings.origins.get(item.name, "default"),
        }
        for item in fields(settings)
        if item.name not in ("config", "origins")
    ]
    if as_json:
        output.print_json(shown)
    else:
        rows = [(each["key"], _in_words(each["value"]), each["origin"]) for each in shown]
        output.print_table(("setting", "value", "from"), rows, "")


def masked(key: str, value: Any) -> Any:
    """A setting as it may be shown, in what JSON knows."""
    if key == "notify" and value is not None:
        parts = urlsplit(value)  # the path of a webhook is what it is known by
        return f"{parts.scheme}://{parts.netloc}/{MASK}"
    return _masked_json(value) if key == "env" else _masked(value)


def _masked(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return mask_text(value)
    if isinstance(value, Mapping):
        return {name: _masked(item) for name, item in value.items()}
    return [_masked(item) for item in value] if isinstance(value, (list, tuple)) else value


def _masked_json(value: Any) -> Any:
    """The same, where names say which values are secret."""
    if isinstance(value, Mapping):
        return {name: MASK if SECRETIVE.search(name) else _masked_json(item) for name, item in value.items()}
    return [_masked_json(item) for item in value] if isinstance(value, list) else _masked(value)


def mask_text(text: str) -> str:
    """A text without what looks secret in it: in URLs, in ``NAME=VALUE`` pairs, in headers and in JSON."""
    if text.lstrip().startswith(("{", "[")):
        with suppress(ValueError, RecursionError):
            return json.dumps(_masked_json(json.loads(text)))
    text = _SCHEME.sub(rf"\1 {MASK}", _URL.sub(_without_login, text))
    for name, value in ((_PAIR, _PAIR_VALUE), (_MEMBER, _MEMBER_VALUE), (_HEADER, _HEADER_VALUE)):
        text = _mask_values(text, name, value)
    return text


def _mask_values(text: str, name: re.Pattern[str], value: re.Pattern[str]) -> str:
    """Mask what follows names that say that it is secret. Names in URLs may be percent-encoded."""
    shown, position = [], 0
    while (found := name.search(text, position)) is not None:
        shown.append(text[position : found.end()])
        position = found.end()
        if SECRETIVE.search(unquote(found[1])) and (hidden := value.match(text, position)) is not None:
            shown.append(MASK)
            position = hidden.end()
    return "".join(shown) + text[position:]


def _without_login(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    end = authority.rfind("@")
    if end < 0 and re.search(r":(?!\d*$)(?!.*\])", authority):
        end = rest.rfind("@")  # a password that should have been encoded, as it has a slash in it
    if end < 0:
        return url[0]
    user, colon, _ = rest[:end].partition(":")
    if scheme.startswith("http"):  # the user of a forge may be a token
        return f"{scheme}{MASK}{rest[end:]}"
    return f"{scheme}{user}{colon}{MASK if colon else ''}{rest[end:]}"


def _in_words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "-"
    return str(value)
