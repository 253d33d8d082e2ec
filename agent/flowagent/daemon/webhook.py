"""Notifications: a URL that is told of every run that ended. Best effort: what is not delivered after some
tries is given up, and what an agent had not sent when it was killed is lost."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio

from flowagent.daemon.log import Log
from flowagent.daemon.tally import Tally
from flowagent.errors import FlowagentError
from flowagent.models import Json
from flowagent.secrets import SecretProvider

if TYPE_CHECKING:
    from flowagent.http import AsyncClient

TRIES = 8
DEADLINE = 60.0
"""Seconds for all tries of one notice."""
MOST_WAITING = 1000
"""Notices that are kept while the URL does not answer; older ones are given up then."""
SIGNATURE = "X-Flowagent-Signature"


class Notices:
    """Sends one notice after the other, in the order in which runs ended."""

    def __init__(
        self, url: str | None, key: str | None, secrets: SecretProvider, tally: Tally, log: Log
    ) -> None:
        self._url = url
        self._key = key
        self._secrets = secrets
        self._tally = tally
        self._host = (
            urlsplit(url).netloc if url else ""
        )  # the rest of a webhook's URL is as good as a password
        self._log = log.bind(notify=self._host)
        self._waiting: deque[bytes] = deque()
        self._under_way = 0
        self._more = anyio.Event()
        self._empty = anyio.Event()
        self._empty.set()

    def __bool__(self) -> bool:
        return self._url is not None

    def check(self) -> None:
        """:raises SecretError: the key that signs notices cannot be had."""
        if self._key is not None:
            self._secrets.get(self._key)

    def add(self, facts: Mapping[str, Json]) -> None:
        """Have a notice of a run that ended sent soon."""
        if self._url is None:
            return
        if len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft()
            self._tally.notices_failed += 1
        self._waiting.append(json.dumps({"event": "run-ended", **facts}).encode())
        if self._empty.is_set():
            self._empty = anyio.Event()
        self._more.set()

    async def run(self) -> None:
        """Send until cancelled. What is left then is given up, and that is said."""
        if self._url is None:
            return
        await self._more.wait()
        try:
            await self._send(self._url)
        finally:
            if left := self._under_way + len(self._waiting):
                self._tally.notices_failed += left
                self._log.warning("notifications were given up, as the agent ends", notices=left)

    async def _send(self, url: str) -> None:
        from flowagent import http  # with it come httpx and ssl

        async with http.client(timeout=10.0) as using:
            while True:
                while self._waiting:
                    self._under_way = 1
                    await self._deliver(using, url, self._waiting.popleft())
                    self._under_way = 0
                self._empty.set()
                self._more = anyio.Event()
                await self._more.wait()

    async def flush(self, at_most: float) -> None:
        """Wait until all is sent, ``at_most`` seconds."""
        with anyio.move_on_after(at_most):
            await self._empty.wait()

    async def _deliver(self, using: AsyncClient, url: str, body: bytes) -> None:
        from flowagent import http

        try:
            request = http.Request(
                what="the notification",
                method="POST",
                url=url,
                where=self._host,
                headers=self._headers(body),
                content=body,
                repeatable=True,  # who receives it can tell by run and attempt
                deadline=DEADLINE,
                attempts=TRIES,
                limit=1 << 16,
            )
            status = (await http.send(using, request)).status_code
            error = None if status < 300 else f"the answer was {status}"
        except FlowagentError as failure:
            error = str(failure)
        if error is not None:
            self._tally.notices_failed += 1
            self._log.warning("a notification was given up", error=error)

    def _headers(self, body: bytes) -> dict[str, str]:
        found = {"Content-Type": "application/json"}
        if self._key is not None:
            key = self._secrets.get(self._key).encode()
            found[SIGNATURE] = "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()
        return found
