"""What an agent answers to those who look after it: alive, ready, status, metrics."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from flowagent.daemon.patience import Waits
from flowagent.daemon.pulse import LATE, Pulse
from flowagent.daemon.tally import Tally
from flowagent.daemon.webserver import Request, Response, json_document, text
from flowagent.errors import FlowagentError

if TYPE_CHECKING:
    from flowagent.daemon.agent import Agent
    from flowagent.daemon.metrics import Metrics

PATIENCE = 3.0
"""Seconds that the store and the launcher may take to answer."""


@dataclass(frozen=True)
class Check:
    """One answer of many: ``name`` is well, or ``why`` not."""

    name: str
    why: str | None = None

    @property
    def well(self) -> bool:
        return self.why is None


class Health:
    """Answers requests about an agent, which may not have come up yet."""

    def __init__(self, pulse: Pulse, tally: Tally, metrics: Metrics | None = None) -> None:
        self._pulse = pulse
        self._tally = tally
        self._metrics = metrics
        self.agent: Agent | None = None

    async def answer(self, request: Request) -> Response:
        """The answer to anybody who may read."""
        answers: Mapping[str, Callable[[Request], Awaitable[Response]]] = {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/status": self._status,
            "/status.json": self._status,
            "/metrics": self._exposition,
        }
        if request.path not in answers:
            return text("there are /livez, /readyz, /status, /status.json and /metrics\n", 404)
        if request.method not in ("GET", "HEAD"):
            return text("only GET is answered here\n", 405)
        return await answers[request.path](request)

    # -- alive, ready ----------------------------------------------------------------------------------

    def alive(self) -> list[Check]:
        """What must be so for the agent to be any good; else only a restart helps."""
        lag = self._pulse.lag
        late = f"the event loop was {lag:.1f} s late" if lag > LATE else None
        stalled = self._pulse.stalled()
        stuck = f"no answer yet to: {', '.join(stalled)}" if stalled else None
        return [Check("loop", late), Check("calls", stuck)]

    async def ready(self) -> list[Check]:
        """What must be so for it to take runs."""
        agent = self.agent
        if agent is None or not agent.ready.is_set():
            return [Check("started", "it has not come up yet")]
        stopping = "it is stopping" if agent.stopping else None
        store = await _answers("store", agent.store.ping)
        return [
            Check("claiming", stopping),
            store if agent.store_trouble is None else Check("store", agent.store_trouble),
            await _answers("launcher", agent.check_launcher),
            Check("disk", agent.disk.low),
        ]

    async def _livez(self, request: Request) -> Response:
        return _verdict(self.alive())

    async def _readyz(self, request: Request) -> Response:
        return _verdict(await self.ready())

    # -- status ----------------------------------------------------------------------------------------

    async def _status(self, request: Request) -> Response:
        status = await self.status()
        wants_json = request.path.endswith(".json") or "application/json" in request.headers.get("accept", "")
        return json_document(status) if wants_json else text(in_words(status))

    async def status(self) -> dict[str, Any]:
        """All that is known, as JSON."""
        tally, agent = self._tally, self.agent
        now = time.time()
        found: dict[str, Any] = {
            "state": "starting",
            "uptime": round(now - tally.started, 1),
            "alive": all(check.well for check in self.alive()),
            "loop_lag": round(self._pulse.lag, 4),
            "stalled": self._pulse.stalled(),
        }
        if agent is None:
            return found
        checks = await self.ready()
        found |= {
            "state": agent.condition,
            "agent": agent.info.name,
            "host": agent.info.host,
            "pid": agent.info.pid,
            "version": agent.info.version,
            "labels": list(agent.info.labels),
            "limit": agent.info.limit,
            "store": agent.store.url,
            "ready": all(check.well for check in checks),
            "not_ready": {check.name: check.why for check in checks if not check.well},
            "disk_free": agent.disk.free(),
            "runs": [
                {
                    "run": attempt.run_id,
                    "attempt": attempt.number,
                    "flow": attempt.flow,
                    "phase": attempt.phase,
                    "seconds": round(now - attempt.since, 3),
                }
                for attempt in agent.attempts
            ],
            "claimed": tally.claimed,
            "ended": dict(tally.ended),
            "again": tally.again,
            "lost": tally.lost,
            "vetoes": tally.vetoes,
        }
        return found

    # -- metrics ---------------------------------------------------------------------------------------

    async def _exposition(self, request: Request) -> Response:
        if self._metrics is None:
            return text("metrics are off; start the agent with --health-address\n", 404)
        from flowagent.daemon.metrics import Readings

        agent = self.agent
        readings = Readings(
            tally=self._tally,
            running=len(agent.attempts) if agent else 0,
            limit=agent.info.limit if agent else 0,
            lag=self._pulse.lag,
            accepting=bool(agent and agent.ready.is_set() and not agent.stopping and agent.disk.low is None),
            store_waits=Waits.total,
            queue_age=await self._queue_age(),
            sources=agent.source_counts if agent else {},
            free=agent.disk.free() if agent else {},
        )
        body, kind = self._metrics.exposition(readings, request.headers.get("accept", ""))
        return Response(body, type=kind)

    async def _queue_age(self) -> float | None:
        if self.agent is None:
            return None
        due = None
        try:
            with anyio.fail_after(PATIENCE):
                due = await self.agent.store.next_due(self.agent.info)
        except (FlowagentError, TimeoutError):
            return None
        return 0.0 if due is None else max(0.0, time.time() - due)


async def _answers(name: str, ask: Callable[[], Awaitable[None]]) -> Check:
    try:
        with anyio.fail_after(PATIENCE):
            await ask()
    except TimeoutError:
        return Check(name, f"no answer within {PATIENCE:g} s")
    except (FlowagentError, OSError) as error:
        return Check(name, str(error))
    return Check(name)


def _verdict(checks: list[Check]) -> Response:
    lines = [
        f"{'ok' if check.well else 'no'}   {check.name}{f': {check.why}' if check.why else ''}"
        for check in checks
    ]
    return text("\n".join(lines) + "\n", 200 if all(check.well for check in checks) else 503)


def in_words(status: Mapping[str, Any]) -> str:
    """A status for people."""
    if "agent" not in status:
        return f"starting, for {status['uptime']:.0f} s\n"
    runs = status["runs"]
    ended = ", ".join(f"{count} {state}" for state, count in sorted(status["ended"].items())) or "none"
    labels = ", ".join(status["labels"]) or "none"
    lines = [
        f"agent {status['agent']} on {status['host']}, pid {status['pid']}, flowagent {status['version']}",
        f"{status['state']}, up for {status['uptime']:.0f} s; {'ready' if status['ready'] else 'not ready'}",
        *(f"  {name}: {why}" for name, why in status["not_ready"].items()),
        f"labels: {labels}",
        f"store:  {status['store']}",
        f"ended:  {ended}",
        f"runs:   {len(runs)} of {status['limit']}",
        *(f"  {run['run']}  {run['flow']}  {run['phase']} for {run['seconds']:.1f} s" for run in runs),
    ]
    return "\n".join(lines) + "\n"
