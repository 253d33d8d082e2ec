"""The control socket: what an agent does for its owner, who proves to be that by a key."""

from __future__ import annotations

import hmac
import json
from typing import TYPE_CHECKING

from flowagent.daemon.webserver import Request, Response, json_document, text

if TYPE_CHECKING:
    from flowagent.daemon.agent import Agent
    from flowagent.daemon.health import Health


class Control:
    """The same for the agent's owner, who may also have it drained. ``key`` is known to nobody else."""

    def __init__(self, health: Health, agent: Agent, key: str) -> None:
        self._health = health
        self._agent = agent
        self._key = key

    async def answer(self, request: Request) -> Response:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
            return text("the key is missing or wrong\n", 403)
        if request.path != "/drain":
            return await self._health.answer(request)
        if request.method != "POST":
            return text("only POST is answered here\n", 405)
        try:
            asked = json.loads(request.body or b"{}")
            deadline = asked.get("deadline")
            if deadline is not None:
                deadline = max(0.0, float(deadline))
        except (ValueError, AttributeError, TypeError, RecursionError):
            return text('the body is to be {"deadline": SECONDS}\n', 400)
        waiting = len(self._agent.attempts)
        self._agent.drain(deadline)
        if asked.get("wait"):
            await self._agent.drained.wait()
        cancelled = self._agent.tally.cancelled_by_drain
        return json_document({"attempts": waiting, "cancelled": cancelled}, 200 if asked.get("wait") else 202)
