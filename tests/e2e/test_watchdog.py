"""The watchdog sees a store that stalls, which is not one that is away."""

from __future__ import annotations

import socket
import sqlite3
import time
from contextlib import closing

from tests.e2e.harness import Site, until


def test_a_store_that_stalls_is_told_on(site: Site) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(site.root / "notify"))
        manager.settimeout(20)

        def signs(seconds: float) -> int:
            end, found = time.monotonic() + seconds, 0
            while (left := end - time.monotonic()) > 0:
                manager.settimeout(left)
                try:
                    found += manager.recv(4096) == b"WATCHDOG=1"
                except TimeoutError:
                    break
            return found

        watchdog = {"NOTIFY_SOCKET": str(site.root / "notify"), "WATCHDOG_USEC": "1200000"}
        agent = site.start("--poll", "0.3s", **watchdog)
        assert signs(2) >= 3
        with closing(sqlite3.connect(site.home / "flowagent.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            until(lambda: "stalled: the watchdog is not told" in site.log(agent))
            signs(0.5)  # what was on its way
            assert signs(1.5) == 0
            other.execute("ROLLBACK")
        assert until(lambda: signs(1))
        assert agent.poll() is None
