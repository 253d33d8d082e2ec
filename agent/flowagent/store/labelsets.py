"""Which label sets an agent can serve. There are few, and they never change: they are kept in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flowagent.models import AgentInfo
from flowagent.store.database import Transaction
from flowagent.store.rows import demands, to_json


class LabelSet(NamedTuple):
    """What runs demand of an agent: all of the labels, and one of the runners; none means any."""

    labels: frozenset[str]
    runners: frozenset[str]

    def served_by(self, agent: AgentInfo) -> bool:
        if self.runners and agent.runner not in self.runners:
            return False
        if not self.labels and agent.require_labels:
            return False
        return self.labels.issubset(agent.labels)


class LabelSets:
    """All label sets up to the id ``newest``, as of some transaction.

    Never changed, so that what was read in a transaction can be kept after its commit, and only then."""

    def __init__(self, newest: int = 0, sets: Mapping[int, LabelSet] = {}) -> None:
        self.newest = newest
        self._sets = sets
        self._served: dict[tuple[frozenset[str], str, bool], str] = {}

    def refreshed(self, tx: Transaction) -> LabelSets:
        """These and those that are new."""
        rows = tx.execute("SELECT id, canon FROM label_set WHERE id > :newest", {"newest": self.newest})
        if not rows:
            return self
        new = {id: LabelSet(*map(frozenset, demands(canon))) for id, canon in rows}
        return LabelSets(max(new), {**self._sets, **new})

    def served_by(self, agent: AgentInfo) -> str:
        """The ids of the label sets that the agent can serve, as a JSON array."""
        key = frozenset(agent.labels), agent.runner, agent.require_labels
        if key not in self._served:
            self._served[key] = to_json([id for id, each in self._sets.items() if each.served_by(agent)])
        return self._served[key]


def label_set_id(tx: Transaction, canon: str) -> int:
    """The id of a label set, which is inserted if it is new."""
    select = "SELECT id FROM label_set WHERE canon = :canon"
    rows = tx.execute(select, {"canon": canon})
    if not rows:
        if tx.dialect.in_order:  # agents look for ids above the newest they know
            tx.execute(tx.dialect.in_order)
        tx.execute("INSERT INTO label_set (canon) VALUES (:canon) ON CONFLICT DO NOTHING", {"canon": canon})
        rows = tx.execute(select, {"canon": canon})
    return int(rows[0][0])
