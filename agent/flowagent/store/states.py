"""The one place where the store writes states: every statement filters by the table in ``models``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from flowagent.errors import StoreError
from flowagent.models import LIVE, State, sources_of
from flowagent.store.database import Transaction


def within(states: Iterable[State], column: str = "state") -> str:
    """An SQL condition. Written so that partial indexes over the same states are recognised."""
    names = [f"'{state.value}'" for state in states]
    return f"{column} = {names[0]}" if len(names) == 1 else f"{column} IN ({', '.join(names)})"


@cache
def may_enter(target: State) -> str:
    """An SQL condition: the row may change to this state."""
    return within(sources_of(target))


IS_LIVE = within(LIVE)


def move_run(tx: Transaction, run_id: str, target: State, assign: str = "", **values: Any) -> None:
    """Change a run's state. ``assign`` sets other columns. :raises StoreError: the table forbids it."""
    moved = tx.execute(
        f"UPDATE run SET state = '{target.value}'{_more(assign)} "  # noqa: S608
        f"WHERE id = :run_id AND {may_enter(target)} RETURNING id",
        {"run_id": run_id, **values},
    )
    if not moved:
        raise StoreError(f"run {run_id} cannot become {target} from the state it is in")


def move_attempt(
    tx: Transaction, run_id: str, number: int, target: State, assign: str = "", **values: Any
) -> None:
    """Change an attempt's state, as :func:`move_run` does."""
    moved = tx.execute(
        f"UPDATE attempt SET state = '{target.value}'{_more(assign)} "  # noqa: S608
        f"WHERE run_id = :run_id AND number = :number AND {may_enter(target)} RETURNING number",
        {"run_id": run_id, "number": number, **values},
    )
    if not moved:
        raise StoreError(f"attempt {number} of run {run_id} cannot become {target} from the state it is in")


def _more(assign: str) -> str:
    return f", {assign}" if assign else ""
