"""Flows behind any HTTP service."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from flowagent.flows.declarations import absolute, patterns, plain, seconds, text
from flowagent.flows.errors import FlowError
from flowagent.storage.base import Storage

METHODS = ("GET", "PATCH", "POST", "PUT")
ARGUMENTS = ("url", "headers", "params", "json", "data", "cookies", "auth", "timeout", "allow_redirects")

_BROKEN = re.compile(r"(?<!\$)(?:\$\$)*\$\{(?![A-Za-z_][A-Za-z0-9_]*\})")


class Webhook(Storage):
    """A flow that one HTTP request stores and another fetches: a pickle, or with ``stored_as_script=True``
    the script, by default the one that registers the flow. ``include`` names files beside it, which are
    stored with it.

    Each request is given by the arguments of a call of ``requests``: ``url``, ``headers``, ``params``,
    ``json``, ``data``, ``cookies``, ``auth`` (user and password), ``timeout`` in seconds and
    ``allow_redirects``; the flow is the body of the one that stores. ``${NAME}`` in any of their strings is
    the environment variable of that name, else the secret, where and when the request is made; ``$$`` is a
    dollar sign, and so is one before anything else.

    :raises FlowError: a value that cannot be, or values that contradict each other
    """

    fields: ClassVar[tuple[str, ...]] = (
        "build_request_kwargs",
        "build_request_http_method",
        "get_flow_request_kwargs",
        "get_flow_request_http_method",
        "flow_script_path",
        "include",
    )

    def __init__(
        self,
        build_request_kwargs: Mapping[str, Any],
        build_request_http_method: str,
        get_flow_request_kwargs: Mapping[str, Any],
        get_flow_request_http_method: str,
        stored_as_script: bool = False,
        flow_script_path: str | os.PathLike[str] | None = None,
        include: Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        self.include = patterns(include, "storage Webhook: include")
        super().__init__(stored_as_script=stored_as_script or bool(self.include), **options)
        self.build_request_kwargs = _arguments(build_request_kwargs, "build_request_kwargs")
        if any(self.build_request_kwargs.get(name) is not None for name in ("json", "data")):
            raise FlowError(
                "storage Webhook: build_request_kwargs: the flow is what is sent; leave json and data out"
            )
        self.build_request_http_method = _method(build_request_http_method, "build_request_http_method")
        self.get_flow_request_kwargs = _arguments(get_flow_request_kwargs, "get_flow_request_kwargs")
        self.get_flow_request_http_method = _method(
            get_flow_request_http_method, "get_flow_request_http_method"
        )
        if flow_script_path is not None and not self.stored_as_script:
            raise FlowError(
                "storage Webhook: flow_script_path= is for scripts; give stored_as_script=True, too"
            )
        self.flow_script_path = absolute(flow_script_path, "storage Webhook: flow_script_path")


def _method(value: Any, name: str) -> str:
    given = value.upper() if isinstance(value, str) else value
    if given not in METHODS:
        raise FlowError(f"storage Webhook: {name} is one of {', '.join(METHODS)}; got {value!r}")
    return str(given)


def _arguments(value: Any, name: str) -> dict[str, Any]:
    """A request's arguments as JSON data; bytes become ``{"$bytes": base64}``."""
    what = f"storage Webhook: {name}"
    if not isinstance(value, Mapping):
        raise FlowError(f"{what} takes a dict with a 'url'; got {value!r}")
    given = dict(value)
    for key in given:
        if key not in ARGUMENTS:
            raise FlowError(f"{what} has no {key!r}; known are {', '.join(ARGUMENTS)}")
    if isinstance(given.get("data"), (bytes, bytearray)):
        given["data"] = {"$bytes": base64.b64encode(given["data"]).decode()}
    if given.get("json") is not None and given.get("data") is not None:
        raise FlowError(f"{what}: json and data exclude each other; give the one or the other")
    if not text(given.get("url"), f"{what}: url"):
        raise FlowError(f"{what} takes a dict with a 'url'")
    for key in ("headers", "params", "cookies"):
        if given.get(key) is not None and not _strings(given[key]):
            raise FlowError(f"{what}: {key} takes a dict of strings; got {type(given[key]).__name__}")
    for text_with in _texts(given):
        if _BROKEN.search(text_with):
            raise FlowError(f"{what} holds ${{ without a name and }}; write $$ for a dollar sign")
    given["timeout"] = seconds(given.get("timeout"), f"{what}: timeout")
    auth = given.get("auth")
    if auth is not None and not (
        isinstance(auth, (list, tuple)) and len(auth) == 2 and all(isinstance(item, str) for item in auth)
    ):
        raise FlowError(f"{what}: auth takes a user and a password, as (user, password)")
    return dict(plain({key: item for key, item in given.items() if item is not None}, what))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _strings(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(item, (str, int, float)) for key, item in value.items()
    )
