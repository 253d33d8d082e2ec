"""What operators do with agents: reload, drain, let them end by themselves, hook in, be told."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tests.e2e.harness import Site, until
from tests.e2e.operating import FAILING, SLEEPER, executable


def events(site: Site, number: int = 0) -> list[dict[str, object]]:
    """What the agent has logged."""
    return [json.loads(line) for line in site.log(site.agents[number]).splitlines()]


def said(site: Site, event: str, number: int = 0) -> dict[str, object] | None:
    return next((entry for entry in events(site, number) if entry["event"] == event), None)


def configure(site: Site, **values: object) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    (site.root / "agent.toml").write_text("[agent]\n" + "\n".join(lines))


# -- reload ----------------------------------------------------------------------------------------------


def test_a_running_agent_reads_its_configuration_again(site: Site) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    configure(site, labels=["a"], limit=1)
    agent = site.start("--config", str(site.root / "agent.toml"))
    gpu = site.submit("sleeper", "--label", "gpu")
    flag = site.shared / "flag"
    held = site.submit("sleeper", "-p", f"flag={flag}")
    site.wait_for(held, "running")

    configure(site, labels=["gpu"], limit=2, log_level="debug", lease=99, max=["output=1M"])
    agent.send_signal(signal.SIGHUP)
    site.wait_for(gpu)  # its label is carried now, and there is room for a second run
    assert "gpu" in site.command("agents").stdout
    reloaded = until(lambda: said(site, "reloaded"))
    assert reloaded["limit"] == 2 and "gpu" in reloaded["labels"]  # type: ignore[operator]
    waiting = said(site, "some settings count from the next start on")
    assert waiting and waiting["settings"] == ["lease"]
    assert any(entry["level"] == "debug" and entry["event"] == "claimed" for entry in events(site))
    flag.touch()
    assert site.wait_for(held)["state"] == "completed"


def test_a_wrong_configuration_is_refused_and_the_old_one_stays(site: Site) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    configure(site, labels=["a"])
    agent = site.start("--config", str(site.root / "agent.toml"))
    configure(site, lables=["b"])
    agent.send_signal(signal.SIGHUP)
    refused = until(lambda: said(site, "not reloaded: the configuration is wrong, the old one stays"))
    assert "key agent.lables is unknown; did you mean agent.labels?" in str(refused["reason"])
    site.wait_for(site.submit("sleeper", "--label", "a"))

    (site.root / "agent.toml").write_bytes(b"\xff\x00")
    agent.send_signal(signal.SIGHUP)
    until(lambda: "is not valid TOML" in site.log(agent))
    configure(site, labels=["b"], hooks="/no/such/directory")
    agent.send_signal(signal.SIGHUP)
    until(lambda: "the hooks in /no/such/directory cannot be read" in site.log(agent))
    site.wait_for(site.submit("sleeper", "--label", "a"))


def test_so_is_one_that_came_before_the_store_was_there(site: Site) -> None:
    site.command("flows")
    configure(site, labels=["a"])
    with closing(sqlite3.connect(site.home / "flowagent.db", isolation_level=None)) as store:
        store.execute("PRAGMA locking_mode = EXCLUSIVE")
        store.execute("BEGIN EXCLUSIVE")
        agent = site.start("--config", str(site.root / "agent.toml"), wait=False)
        until(lambda: "the store does not answer yet" in site.log(agent))
        configure(site, labels=["b"], hooks="/no/such/directory")
        agent.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    until(lambda: said(site, "started"))
    assert until(lambda: said(site, "not reloaded: the configuration is wrong, the old one stays"))
    site.command("register", site.write("sleeper.py", SLEEPER))
    site.wait_for(site.submit("sleeper", "--label", "a"))


# -- ends ------------------------------------------------------------------------------------------------


def test_drain_waits_for_runs_and_takes_nothing_new(site: Site) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    agent = site.start("--drain", "30s")
    flag = site.shared / "flag"

    def asked(times: int) -> bool:
        return [entry["event"] for entry in events(site)].count("asked to drain") == times

    held = site.submit("sleeper", "-p", f"flag={flag}")
    site.wait_for(held, "running")
    done = site.command("drain", "--no-wait", "--json")
    assert json.loads(done.stdout)["attempts"] == 1
    until(lambda: said(site, "draining"))
    late = site.submit("sleeper")
    asking = threading.Thread(target=lambda: (until(lambda: asked(2)), flag.touch()))
    asking.start()
    done = site.command("drain")  # asking again does not end it sooner; this one waits
    asking.join()
    assert "is drained: 1 runs have ended" in done.stderr
    assert agent.wait(20) == 0
    assert site.state(held) == "completed" and site.state(late) == "scheduled"
    assert "no agent runs on this machine" in site.command("drain", code=1).stderr


def test_a_deadline_cancels_what_is_left(site: Site) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    agent = site.start("--name", "one", "--grace", "1s")
    held = site.submit("sleeper", "-p", f"flag={site.shared / 'never'}")
    site.wait_for(held, "running")
    site.start("--name", "two")
    assert "several agents run here; name one: one, two" in site.command("drain", code=1).stderr
    assert "no agent named three" in site.command("drain", "three", code=1).stderr
    done = site.command("drain", "one", "--deadline", "0.2s", code=3)
    assert "of which 1 had to be cancelled" in done.stderr
    assert agent.wait(20) == 0
    assert site.state(held) == "cancelled"


def test_the_control_socket_wants_its_key(site: Site) -> None:
    agent = site.start("--name", "one")
    key = until(lambda: next((site.home / "agents/one/launchers").glob("control.key"), None))
    assert key.stat().st_mode & 0o777 == 0o600
    assert (key.parent / "control.sock").stat().st_mode & 0o777 == 0o600
    right = key.read_text()
    key.write_text("0" * 64)
    assert "the key is missing or wrong" in site.command("drain", code=1).stderr
    assert agent.poll() is None
    key.write_text(right)
    site.command("drain")


def test_an_agent_ends_after_so_many_runs(site: Site) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    runs = [site.submit("sleeper") for _ in range(4)]
    agent = site.start("--max-runs", "3", "--limit", "2", wait=False)
    assert agent.wait(30) == 0
    assert sorted(site.state(run) for run in runs) == ["completed"] * 3 + ["scheduled"]


def test_an_agent_ends_when_it_was_idle(site: Site) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    run = site.submit("sleeper")
    agent = site.start("--idle-exit", "1s", "--poll", "1s", wait=False)
    assert agent.wait(30) == 0
    assert site.state(run) == "completed" and said(site, "it was idle for long enough")


def test_an_agent_that_leaves_says_so_and_its_runs_go_on(site: Site) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    agent = site.start("--name", "one")
    flag = site.shared / "flag"
    held = site.submit("sleeper", "-p", f"flag={flag}")
    site.wait_for(held, "running")
    assert site.stop(agent, signal.SIGQUIT) == 75
    site.start("--name", "one")
    assert until(lambda: said(site, "found a live attempt", 1))
    flag.touch()
    assert site.wait_for(held)["state"] == "completed"
    assert len(site.show(held)["attempts"]) == 1


def test_a_full_disk_ends_an_agent_that_runs_once(site: Site) -> None:
    done = site.command("start", "--once", "--reserve", "500T", code=1)
    assert "nothing was taken: " in done.stderr.splitlines()[-1] and "make room" in done.stderr


def test_an_agent_that_the_store_does_not_let_go_has_stopped_all_the_same(site: Site) -> None:
    agent = site.start()
    with closing(sqlite3.connect(site.home / "flowagent.db")) as database:
        database.execute("CREATE TRIGGER no BEFORE DELETE ON agent BEGIN SELECT RAISE(ABORT, 'no'); END")
    assert site.stop(agent) == 0
    assert said(site, "the store does not know that the agent has stopped")


# -- hooks -----------------------------------------------------------------------------------------------

TELL = """#!/bin/sh
echo "$HOOK_EVENT $HOOK_FLOW $HOOK_RUN $HOOK_STATE $HOOK_REASON" >> {log}
cat >> {log}.json; echo >> {log}.json
"""


def test_hooks_are_told_of_sources_and_runs(site: Site) -> None:
    script = FAILING.replace("@flow", "@flow(storage=Local(stored_as_script=False))").replace(
        "import flow\n", "import flow\n    from flowagent.storage import Local\n"
    )
    site.command("register", site.write("failing.py", script))
    hooks, log = site.root / "hooks", site.root / "told"
    for event in ("before-source", "after-source", "before-run", "after-run.10-first", "after-run.20-second"):
        executable(hooks / event, TELL.format(log=log))
    executable(hooks / "README", "#!/bin/false\n")
    site.start("--hooks", str(hooks), FLOWAGENT_SECRET_X="hunter2")
    runs = [site.submit("failing") for _ in range(2)]
    for run in runs:
        site.wait_for(run)
        until(lambda run=run: log.read_text().count(f"after-run failing {run} failed") == 2)
    lines = log.read_text().splitlines()
    assert [line.split()[0] for line in lines].count(
        "before-source"
    ) == 1  # the second run found it in the cache
    assert [line.split()[0] for line in lines].count("after-source") == 1
    assert [line.split()[0] for line in lines].count("before-run") == 2
    assert lines[-1].endswith("ValueError: no"), lines
    facts = [json.loads(line) for line in log.with_suffix(".json").read_text().splitlines()]
    assert facts[0]["event"] == "before-source" and facts[0]["storage"] == "Local"
    assert "hunter2" not in log.with_suffix(".json").read_text()


@pytest.mark.parametrize("event", ["before-source", "after-source", "before-run"])
def test_a_hook_may_refuse(site: Site, event: str) -> None:
    script = SLEEPER.replace("@flow", "@flow(storage=Local(stored_as_script=False))").replace(
        "import flow\n", "import flow\n    from flowagent.storage import Local\n"
    )
    site.command("register", site.write("sleeper.py", script))
    hook = executable(
        site.root / "hooks" / event, "#!/bin/sh\necho first; echo 'not on  Sundays' >&2\nexit 1\n"
    )
    site.start("--hooks", str(hook.parent))
    started = site.shared / "started"
    shown = site.wait_for(site.submit("sleeper", "-p", f"started={started}"))
    assert shown["state"] == "crashed"
    assert shown["reason"] == f"could not be started: the hook {event} refused: not on Sundays"
    assert not started.exists()
    if event.endswith("source"):
        assert "sha256" not in site.command("cache", "ls").stdout
    hook.unlink()
    assert site.wait_for(site.submit("sleeper"))["state"] == "completed"


def test_a_hook_may_refuse_for_now(site: Site) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    hook = executable(site.root / "hooks/before-run", "#!/bin/sh\n[ $HOOK_ATTEMPT = 2 ] || exit 75\n")
    site.start("--hooks", str(hook.parent))
    shown = site.wait_for(site.submit("sleeper", "--retries", "1"))
    assert shown["state"] == "completed" and len(shown["attempts"]) == 2


def test_a_hook_that_hangs_is_killed_with_all_that_it_started(site: Site) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    pid = site.root / "pid"
    hook = executable(site.root / "hooks/before-run", f"#!/bin/sh\nsleep 1000 & echo $! > {pid}\nwait\n")
    site.start("--hooks", str(hook.parent), "--hook-timeout", "0.5s")
    shown = site.wait_for(site.submit("sleeper"))
    assert "took longer than 0.5 s, and was killed" in shown["reason"]
    until(lambda: not os.path.exists(f"/proc/{pid.read_text().strip()}"))


def test_cancelling_a_run_ends_its_hook(site: Site) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    pid = site.root / "pid"
    hook = executable(site.root / "hooks/before-run", f"#!/bin/sh\necho $$ > {pid}\nexec sleep 1000\n")
    site.start("--hooks", str(hook.parent), "--hook-timeout", "100s")
    run = site.submit("sleeper")
    until(lambda: pid.exists() and pid.read_text().strip())
    site.command("cancel", run)
    assert site.wait_for(run)["state"] == "cancelled"
    until(lambda: not os.path.exists(f"/proc/{pid.read_text().strip()}"))


@pytest.mark.parametrize(("mode", "why"), [(0o777, "others than root"), (0o644, "is not executable")])
def test_a_hook_that_others_can_write_is_not_run(site: Site, mode: int, why: str) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    hook = executable(site.root / "hooks/before-run", "#!/bin/sh\ntouch /tmp/was-run\n")
    site.start("--hooks", str(hook.parent))
    hook.chmod(mode)
    shown = site.wait_for(site.submit("sleeper"))
    assert shown["state"] == "crashed" and why in shown["reason"], shown["reason"]
    assert why in site.command("start", "--hooks", hook.parent, code=1).stderr


def test_what_a_start_finds_wrong_before_a_run_does(site: Site) -> None:
    done = site.command("start", "--once", "--hooks", site.root / "nowhere", code=1)
    assert done.stderr.splitlines()[-1].startswith(
        f"Error: the hooks in {site.root}/nowhere cannot be read: "
    )
    done = site.command("start", "--once", "--notify", "http://127.0.0.1:1/", "--notify-key", "K", code=1)
    assert done.stderr.splitlines()[-1].startswith("Error: secret K is not set")
    misnamed = executable(site.root / "hooks/before_run", "#!/bin/false\n")
    done = site.command("start", "--once", "--hooks", misnamed.parent)
    assert "no hooks, by their names" in done.stderr and "before_run" in done.stderr


# -- notifications ---------------------------------------------------------------------------------------


class Receiver(HTTPServer):
    """A webhook that fails as often as it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hook)
        self.failures = 0
        self.redirect: str | None = None
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/services/s3cret"


class Hook(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        failing, self.server.failures = self.server.failures > 0, self.server.failures - 1
        if not failing:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.server.received.append((headers, body))
        self.send_response(503 if failing else 307 if self.server.redirect else 204)
        if self.server.redirect:
            self.send_header("Location", self.server.redirect)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_end_of_a_run_is_told(site: Site, receiver: Receiver) -> None:
    site.command("register", site.write("failing.py", FAILING))
    receiver.failures = 1
    environ = {"FLOWAGENT_SECRET_HOOK": "k3y"}
    agent = site.start("--notify", receiver.url, "--notify-key", "HOOK", **environ)
    run = site.submit("failing", "--retries", "1")
    site.wait_for(run)
    ((headers, body),) = until(lambda: receiver.received)
    told = json.loads(body)
    assert (told["event"], told["run"], told["flow"], told["state"]) == (
        "run-ended",
        run,
        "failing",
        "failed",
    )
    assert told["attempt"] == 2 and told["reason"].endswith("ValueError: no") and told["ended"] > 0
    assert headers["x-flowagent-signature"] == "sha256=" + hmac.new(b"k3y", body, hashlib.sha256).hexdigest()
    receiver.failures = 1000
    site.wait_for(site.submit("failing"))
    site.stop(agent, timeout=60)
    log = site.log(agent)
    assert "s3cret" not in log and "k3y" not in log


def test_notices_are_sent_before_an_agent_ends_and_to_nobody_else(site: Site, receiver: Receiver) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    runs = [site.submit("sleeper") for _ in range(3)]
    site.command("start", "--once", "--notify", receiver.url)
    assert sorted(json.loads(body)["run"] for _, body in receiver.received) == sorted(runs)
    receiver.redirect = receiver.url + "/elsewhere"
    run = site.submit("sleeper")
    done = site.command("start", "--once", "--notify", receiver.url)
    assert "a notification was given up" in done.stderr and "the answer was 307" in done.stderr
    assert [json.loads(body)["run"] for _, body in receiver.received[3:]] == [run]


def test_the_end_of_a_run_whose_agent_is_gone_is_told_by_another(site: Site, receiver: Receiver) -> None:
    site.command("register", site.write("sleeper.py", SLEEPER))
    agent = site.start("--name", "first", "--lease", "1s")
    run = site.submit("sleeper", "-p", f"flag={site.shared / 'never'}")
    site.wait_for(run, "running")
    site.stop(agent, signal.SIGKILL)
    site.start("--name", "second", "--lease", "1s", "--notify", receiver.url)
    ((_, body),) = until(lambda: receiver.received)
    told = json.loads(body)
    assert (told["run"], told["state"], told["agent"], told["attempt"]) == (run, "crashed", "first", 1)
    assert told["reason"].startswith("lease lost: ") and told["storage"] == "Local"
