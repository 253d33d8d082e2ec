"""Operations on the agents that have announced themselves."""

from __future__ import annotations

from flowagent.errors import UsageError
from flowagent.models import AgentInfo
from flowagent.store import rows
from flowagent.store.database import Transaction
from flowagent.store.states import IS_LIVE

ALIVE = 30.0
"""Seconds since it was last seen for which an agent counts as alive."""

_ANNOUNCE = f"""
    INSERT INTO agent (name, instance, host, pid, labels, runner, capacity, version, require_labels, started,
        seen, stopping)
    VALUES (:name, :instance, :host, :pid, :labels, :runner, :capacity, :version, :require_labels, :started,
        :now, :stopping)
    ON CONFLICT (name) DO UPDATE SET instance = excluded.instance, host = excluded.host, pid = excluded.pid,
        labels = excluded.labels, runner = excluded.runner, capacity = excluded.capacity,
        version = excluded.version, require_labels = excluded.require_labels, started = excluded.started,
        seen = excluded.seen, stopping = excluded.stopping
    WHERE agent.host = excluded.host OR agent.seen < :now - :alive AND NOT EXISTS (
        SELECT 1 FROM attempt WHERE attempt.agent = :name AND {IS_LIVE} AND attempt.lease_expires >= :now)
    RETURNING name"""  # noqa: S608


def announce(tx: Transaction, agent: AgentInfo) -> None:
    condition = rows.STOPPING if agent.stopping else rows.NO_ROOM if agent.no_room else rows.CLAIMING
    values = {
        "name": agent.name,
        "instance": agent.instance,
        "host": agent.host,
        "pid": agent.pid,
        "labels": rows.to_json(sorted(agent.labels)),
        "runner": agent.runner,
        "capacity": agent.limit,
        "version": agent.version,
        "require_labels": int(agent.require_labels),
        "started": agent.started,
        "stopping": condition,
        "alive": ALIVE,
    }
    if not tx.execute(_ANNOUNCE, values):
        (host,) = tx.execute("SELECT host FROM agent WHERE name = :name", values)[0]
        raise UsageError(
            f"an agent named {agent.name!r} is alive on host {host!r}; start this one with another --name"
        )


def agents(tx: Transaction) -> list[AgentInfo]:
    found = tx.execute(
        f"SELECT {rows.AGENT_COLUMNS}, COALESCE(held.running, 0) FROM agent a "  # noqa: S608
        f"LEFT JOIN (SELECT agent AS name, count(*) AS running FROM attempt WHERE {IS_LIVE} "
        f"GROUP BY agent) held ON held.name = a.name ORDER BY a.seen DESC, a.name"
    )
    return [rows.agent(row) for row in found]


def depart(tx: Transaction, name: str) -> None:
    tx.execute("DELETE FROM agent WHERE name = :name", {"name": name})
