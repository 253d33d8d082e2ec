"""Asks for runs and looks into the store, in the jail and as the agent's user; a line of JSON for each.

``{"ask": [[flow, parameters, environment], ...]}`` is answered by the runs' ids,
``{"query": [sql, value, ...]}`` by the rows, in which bytes are Latin-1.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from typing import Any

from flowagent.settings import load
from flowagent.store import open_store
from flowagent.submission import submit


async def ask(runs: list[Any]) -> list[str]:
    store = await open_store(load().store)
    try:
        return [(await submit(store, name, given, env=env))[0].id for name, given, env in runs]
    finally:
        await store.close()


def _plain(cell: Any) -> Any:
    return cell.decode("latin-1") if isinstance(cell, bytes) else cell


def main() -> None:
    database = sqlite3.connect(load().store.removeprefix("sqlite:///"), timeout=10)
    for line in sys.stdin:
        request = json.loads(line)
        if "ask" in request:
            answer: Any = asyncio.run(ask(request["ask"]))
        else:
            sql, *values = request["query"]
            rows = database.execute(sql, values).fetchall()
            answer = [[_plain(cell) for cell in row] for row in rows]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
