"""What others can know of an agent that takes nothing: the store is locked, the disk is nearly full."""

from __future__ import annotations

import json
import signal
import sqlite3
from contextlib import closing

from tests.e2e.harness import Site, until
from tests.e2e.operating import SLEEPER, get, health_of, status


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


def test_an_agent_without_room_says_so_to_all(site: Site) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    config = site.root / "agent.toml"
    config.write_text("[agent]\nreserve = '500T'\n")
    agent = site.start("--config", str(config), "--name", "one", "--poll", "0.2s")
    run = site.submit("sleeper")
    until(lambda: "no room" in site.command("agents").stdout)
    why = "one takes nothing new until there is room on its disk"
    shown = site.command("explain", run).stdout
    assert f"no live agent can take it: {why}" in shown and "has room" not in shown
    (listed,) = json.loads(site.command("agents", "--here", "--json").stdout)
    assert (listed["state"], listed["no_room"]) == ("no room", True)
    config.write_text("[agent]\nreserve = '1M'\n")
    agent.send_signal(signal.SIGHUP)
    site.wait_for(run)
    until(lambda: "no room" not in site.command("agents").stdout)


def test_a_reload_does_not_take_what_the_next_start_would_fail_with(site: Site) -> None:
    config = site.root / "agent.toml"
    config.write_text("")
    agent = site.start("--config", str(config))
    for text, why in (
        ("store = 'mysql://u:hunter2@h/d'", "store has a value that cannot be, and sqlite:////"),
        ("[agent]\nrun_as = 'nobody-of-this-name'", "--run-as"),
    ):
        before = site.log(agent).count("not reloaded: the configuration is wrong")
        config.write_text(text)
        agent.send_signal(signal.SIGHUP)
        until(lambda before=before: site.log(agent).count("not reloaded: the conf") > before)
        assert why in site.log(agent)
    assert "hunter2" not in site.log(agent)


def test_a_reload_warns_of_directories_that_are_not_there(site: Site) -> None:
    config = site.root / "agent.toml"
    config.write_text("")
    agent = site.start("--config", str(config))
    config.write_text("[agent]\nimport_paths = ['/no/such/place']\n")
    agent.send_signal(signal.SIGHUP)
    until(lambda: '"import_path": "/no/such/place"' in site.log(agent))
