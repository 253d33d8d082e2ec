"""Names of things in a cluster."""

from __future__ import annotations

import base64
import json
import re
from typing import NamedTuple

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_ACCOUNT = "system:serviceaccount:"


def is_label(name: str) -> bool:
    """Whether it can name a namespace, and anything else: a DNS label of RFC 1123."""
    return _LABEL.fullmatch(name) is not None


class Account(NamedTuple):
    """A service account."""

    namespace: str
    name: str


def account_of(token: str | None) -> Account | None:
    """Whose token it is; None: not that of a service account, or it does not say. Nothing is verified: this
    is for tokens of one's own."""
    try:
        _, claims, _ = (token or "").strip().split(".")
        subject = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["sub"]
        namespace, name = subject.removeprefix(_ACCOUNT).split(":")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return Account(namespace, name) if subject.startswith(_ACCOUNT) else None
