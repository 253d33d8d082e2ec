"""``config``: the settings that a command or an agent here would go by, and where each was set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from flowagent.cli import output
from flowagent.cli.session import Command, Session, json_option, pass_session

MASK = "***"
_WORDS = "pass|secret|token|key|credential|auth|pwd"
SECRETIVE = re.compile(_WORDS, re.IGNORECASE)
"""Names whose values are not shown."""
_PAIR = re.compile(rf"([\w.-]*(?:{_WORDS})[\w.-]*)=('(?:\\.|[^'\\])*'|[^&\s]*)", re.IGNORECASE)
_URL = re.compile(r"([a-z][a-z0-9+.-]*://)(\S+)", re.IGNORECASE)


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
    if key == "store":
        return mask_text(value)
    if key == "notify" and value is not None:
        parts = urlsplit(value)  # the path of a webhook is what it is known by
        return f"{parts.scheme}://{parts.netloc}/{MASK}"
    if key == "env":
        return {name: MASK if SECRETIVE.search(name) else mask_text(text) for name, text in value.items()}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def mask_text(text: str) -> str:
    """A text without the passwords and tokens of the URLs and of the ``NAME=VALUE`` pairs in it."""
    return _PAIR.sub(rf"\1={MASK}", _URL.sub(_without_login, text))


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
