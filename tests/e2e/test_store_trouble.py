"""A store that answers questions and takes nothing new."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from tests.e2e.harness import Site, until
from tests.e2e.operating import get, health_of, status


def test_an_agent_that_cannot_claim_is_not_ready(site: Site) -> None:
    agent = site.start("--health-address", "127.0.0.1:0", "--poll", "0.5s", "--lease", "3s")
    url = health_of(site, agent)
    until(lambda: get(f"{url}/readyz")[0] == 200)
    with closing(sqlite3.connect(site.home / "flowagent.db", isolation_level=None)) as store:
        store.execute("BEGIN IMMEDIATE")
        _, text = until(lambda: (answer := get(f"{url}/readyz"))[0] == 503 and answer)
        assert "no   store: " in text and "is locked by another process" in text
        assert "is locked" in status(url)["not_ready"]["store"]
    until(lambda: get(f"{url}/readyz")[0] == 200)
    assert "ok   store\n" in get(f"{url}/readyz")[1]
