"""Runs in containers: what comes out of them, what they may do, and how they end."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from tests.containers.conftest import start
from tests.containers.machinery import BARE, OLD, Engine
from tests.e2e.harness import Site, until

FLOW = """
from flowagent import Flow, task
from flowagent.run_configs import DockerRun
from flowagent.storage import Local

{code}

with Flow({name!r}, storage=Local(stored_as_script=True), run_config=DockerRun({config})) as flow:
    work()
"""


def register(site: Site, name: str, body: str, config: str = "") -> None:
    """A flow of one task, whose function has this body."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    code = f"import json, os, signal, sys, time\n\n@task\ndef work():\n{lines}"
    site.command("register", site.write(f"{name}.py", FLOW.format(code=code, name=name, config=config)))


def raw(site: Site, run: str) -> bytes:
    """The text of a run as the store has it, without events."""
    from flowagent.runtime.events import Parser, Text

    with closing(sqlite3.connect(site.home / "flowagent.db")) as database:
        rows = database.execute("SELECT data FROM output WHERE run_id = ? ORDER BY start", [run]).fetchall()
    parser = Parser()
    items = [item for (data,) in rows for item in parser.feed(data)] + list(parser.close())
    return b"".join(item.data for item in items if isinstance(item, Text))


def text(site: Site, run: str) -> str:
    return raw(site, run).decode(errors="replace")


def test_a_flow_runs_in_an_image_without_flowagent(yard: Site, engine: Engine) -> None:
    yard.write("side.txt", "next to the script")
    register(
        yard,
        "plain",
        """
here = os.path.dirname(__file__)
print(open(here + "/side.txt").read(), os.path.exists("/etc/hostname"), os.environ["COLOUR"])
return {"answer": 42}
""",
        'env={"COLOUR": "blue"}',
    )
    run = yard.submit("plain")
    shown = yard.wait_for(run)
    assert shown["state"] == "completed", shown
    assert text(yard, run) == "next to the script True blue\n"
    assert shown["attempts"][0]["sandbox"] == "container"
    assert shown["attempts"][0]["peak_memory"] > 1 << 20
    result = shown["tasks"][0]["result"]
    assert result["size"] > 10, result
    assert yard.command("show", run).stdout
    until(lambda: f"flowagent-{run}.1" not in engine.containers())


def test_any_run_config_that_asks_for_no_other_runner_will_do(yard: Site) -> None:
    yard.write(
        "anyhow.py",
        """
        from flowagent import flow
        from flowagent.storage import Local

        @flow(storage=Local(stored_as_script=True))
        def anyhow(n=1):
            print(n + 1)
        """,
    )
    yard.command("register", yard.sources / "anyhow.py")
    assert "\n42\n" in "\n" + text(yard, _done(yard, "anyhow", "-p", "n=41"))


def test_files_beside_a_flow_take_no_place_of_what_runs_it(yard: Site) -> None:
    for name in ("queue", "inspect", "random", "pickle", "dataclasses", "logging"):
        yard.write(f"beside/{name}.py", "this is no Python")
    code = "@task\ndef work():\n    print('worked')"
    yard.write("beside/crowded.py", FLOW.format(code=code, name="crowded", config=""))
    yard.command("register", yard.sources / "beside" / "crowded.py")
    assert text(yard, _done(yard, "crowded")) == "worked\n"


def _done(site: Site, name: str, *options: str) -> str:
    run = site.submit(name, *options)
    shown = site.wait_for(run)
    assert shown["state"] == "completed", (shown, text(site, run))
    return run


def test_a_pickle_runs_where_only_its_bytes_are(yard: Site) -> None:
    yard.write(
        "pickled.py",
        """
        from flowagent import Flow, task

        @task
        def say():
            print("out of a pickle")

        with Flow("pickled") as flow:
            say()
        """,
    )
    yard.command("register", yard.sources / "pickled.py")
    assert text(yard, _done(yard, "pickled")) == "out of a pickle\n"


def test_every_byte_arrives_whatever_the_engine_makes_of_text(yard: Site) -> None:
    register(
        yard,
        "bytes",
        r"""
import random
noise = random.Random(5).randbytes(300_000)
long = ("a" * 16383 + "\u00e9" + "\u6f22" * 20_000).encode()
for part in (b"\xff\xfe bad\n", long, b"\n", noise, b"\rback\x00nul\n", "gr\u00fc\n".encode(), b"no end"):
    os.write(1, part)
""",
    )
    run = _done(yard, "bytes")
    import random

    noise = random.Random(5).randbytes(300_000)
    long = ("a" * 16383 + "\u00e9" + "\u6f22" * 20_000).encode()
    want = b"\xff\xfe bad\n" + long + b"\n" + noise + b"\rback\x00nul\n" + "gr\u00fc\n".encode()
    # noise may hold what looks like an event's beginning; the text that comes of it is the same
    assert raw(yard, run) == want + b"no end"


def test_nothing_is_allowed_that_was_not_given(yard: Site, engine: Engine) -> None:
    register(
        yard,
        "rights",
        """
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({key: status[key].strip() for key in ("CapEff", "CapBnd", "NoNewPrivs")}), flush=True)
print(os.path.exists("/var/run/docker.sock"), flush=True)
while not os.path.exists("/tmp/go"):
    time.sleep(0.02)
""",
    )
    run = yard.submit("rights")
    until(lambda: "False" in text(yard, run))
    container = f"flowagent-{run}.1"
    found = engine.inspect(container)
    engine.docker("exec", container, "/bin/sh", "-c", "echo > /tmp/go")
    yard.wait_for(run, "completed")
    assert json.loads(text(yard, run).splitlines()[0]) == {
        "CapEff": "0000000000000000",
        "CapBnd": "0000000000000000",
        "NoNewPrivs": "1",
    }
    host = found["HostConfig"]
    assert host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges"] and host["Init"]
    assert host["Memory"] == 256 << 20 and host["PidsLimit"] > 0 and not host["Privileged"]
    assert found["Config"]["Labels"]["flowagent.run"] == run
    assert found["Config"]["Labels"]["flowagent.attempt"] == "1"


def test_secrets_are_in_no_configuration_and_on_no_disk(yard: Site, engine: Engine) -> None:
    yard.command("secret", "set", "TOKEN", input="correct-horse-battery")
    yard.write(
        "hush.py",
        """
        import os, time
        from flowagent import Flow, task
        from flowagent.flows.context import context
        from flowagent.run_configs import DockerRun
        from flowagent.storage import Local
        from flowagent import Secret

        @task
        def work(token):
            print("it has", len(token), "letters:", token, flush=True)
            while not os.path.exists("/tmp/go"):
                time.sleep(0.02)

        with Flow("hush", storage=Local(stored_as_script=True), run_config=DockerRun()) as flow:
            work(Secret("TOKEN"))
        """,
    )
    yard.command("register", yard.sources / "hush.py")
    run = yard.submit("hush")
    container = f"flowagent-{run}.1"
    until(lambda: "it has" in text(yard, run), 30)
    told = json.dumps(engine.inspect(container))
    seen = engine.docker("exec", container, "/bin/sh", "-c", "cat /proc/*/environ /proc/*/cmdline")
    files = engine.docker(
        "exec",
        container,
        "/bin/busybox",
        "grep",
        "-rl",
        "correct-horse",
        "/tmp",
        "/root",
        "/flowagent",
        code=None,
    )
    engine.docker("exec", container, "/bin/sh", "-c", "echo > /tmp/go")
    yard.wait_for(run, "completed")
    assert "correct-horse" not in told + seen
    # the flow itself has printed it: that file, in its own container, is all that there is
    assert [line for line in files.splitlines() if not line.endswith("/run/output")] == []
    assert "correct-horse" not in text(yard, run) and "21 letters" in text(yard, run)


def test_parameters_and_variables_are_in_no_configuration_and_on_no_disk(
    yard: Site, engine: Engine, tmp_path: Path
) -> None:
    yard.write(
        "discreet.py",
        """
        import os, time
        from flowagent import flow
        from flowagent.run_configs import DockerRun
        from flowagent.storage import Local

        @flow(storage=Local(stored_as_script=True), run_config=DockerRun(env={"WORD": "-".join("onyx")}))
        def discreet(word=""):
            print(len(word), len(os.environ["WORD"]), flush=True)
            while not os.path.exists("/tmp/go"):
                time.sleep(0.02)
        """,
    )
    yard.command("register", yard.sources / "discreet.py")
    run = yard.submit("discreet", "-p", "word=staple-battery")
    container = f"flowagent-{run}.1"
    until(lambda: "14 7\n" in text(yard, run), 30)
    engine.docker("export", "-o", str(tmp_path / "disk.tar"), container)
    seen = (tmp_path / "disk.tar").read_bytes() + json.dumps(engine.inspect(container)).encode()
    engine.docker("exec", container, "/bin/sh", "-c", "echo > /tmp/go")
    assert yard.wait_for(run)["state"] == "completed"
    assert b"def discreet(" in seen  # the flow itself
    assert b"staple-battery" not in seen and b"o-n-y-x" not in seen


@pytest.mark.parametrize(
    ("name", "body", "state", "reason"),
    [
        ("raises", "raise ValueError('no good')", "failed", "ValueError: no good"),
        ("exits", "os._exit(3)", "failed", "exited with code 3 before the flow had ended"),
        ("killed", "os.kill(os.getpid(), 9)", "crashed", "killed by SIGKILL"),
        ("hungry", "x = [bytearray(1 << 20) for _ in range(4096)]", "crashed", "out of memory (its limit is"),
        ("slow", "time.sleep(60)", "failed", "timed out after 1 s"),
        ("murder", "os.kill(os.getppid(), 9); time.sleep(60)", "crashed", "the container ended with exit"),
    ],
)  # fmt: skip
def test_ends_are_told_apart(yard: Site, name: str, body: str, state: str, reason: str) -> None:
    register(yard, name, body, "timeout=1" if name == "slow" else "")
    shown = yard.wait_for(yard.submit(name))
    assert (shown["state"], reason in shown["reason"]) == (state, True), shown["reason"]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (BARE, "image base/bare:1 has no python3; use an image with Python 3.9 or newer"),
        (OLD, "python3 in image base/old:1 is 3.6.8; flows need 3.9 or newer"),
        ("127.0.0.1:1/no/such:1", "such:1 cannot be pulled: the registry cannot be reached"),
    ],
)  # fmt: skip
def test_images_that_will_not_do(yard: Site, image: str, reason: str) -> None:
    register(yard, f"in-{image[:7]}", "pass", f"image={image!r}")
    shown = yard.wait_for(yard.submit(f"in-{image[:7]}"))
    assert shown["state"] == "crashed" and reason in shown["reason"], shown["reason"]


def test_a_container_that_ends_before_it_has_its_source(yard: Site) -> None:
    (yard.sources / "large.bin").write_bytes(bytes(8 << 20))
    register(yard, "no-room", "pass", 'host_config={"ReadonlyRootfs": True, "Tmpfs": {"/tmp": "size=1m"}}')
    shown = yard.wait_for(yard.submit("no-room"))
    (yard.sources / "large.bin").unlink()
    assert shown["state"] == "crashed", shown
    assert "the container cannot be used: [Errno 28] No space left on device" in shown["reason"]


def test_cancelling_asks_then_kills(yard: Site, engine: Engine) -> None:
    register(
        yard,
        "polite",
        """
def on_term(*_):
    print("asked to end", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, on_term)
print("ready", flush=True)
time.sleep(60)
""",
    )
    register(
        yard,
        "deaf",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)",
    )
    for name in ("polite", "deaf"):
        run = yard.submit(name)
        until(lambda run=run: "ready" in text(yard, run), 30)
        yard.command("cancel", run)
        assert yard.wait_for(run)["state"] == "cancelled"
        assert ("asked to end" in text(yard, run)) == (name == "polite")
        until(lambda run=run: f"flowagent-{run}.1" not in engine.containers())


def test_what_is_not_allowed_is_refused_with_the_way_out(site: Site) -> None:
    start(site, "--registry-allow", "127.0.0.1:5000/good", "--allow-read", str(site.shared))
    for name, config, reason in [
        ("elsewhere", "image='evil.example/x'", "from a registry that this agent does not allow"),
        ("nameless", "image='../x'", "is no image"),
        ("powerful", "host_config={'Privileged': True}", "--allow-host-config Privileged"),
        ("nosy", "volumes=['/etc:/host']", "--allow-write /etc"),
        ("nosier", "volumes=['/root/.ssh:/root/.ssh:ro']", "--allow-read /root/.ssh"),
        ("sly", f"volumes=['{site.shared}/link:/x:ro']", "does not allow"),
        ("named", "volumes=['other:/x:ro']", "--volume other:/x"),
    ]:
        register(site, name, "pass", config)
        shown = site.wait_for(site.submit(name))
        assert shown["state"] == "crashed" and reason in shown["reason"], shown["reason"]


def test_volumes_are_mounted(site: Site, engine: Engine) -> None:
    keys = site.root / "keys"
    keys.mkdir()
    (keys / "id").write_text("a key")
    (site.shared / "given").write_text("read me")
    start(
        site, "--volume", "./keys:/root/.ssh:ro", "--volume", "notes:/notes", "--allow-read", str(site.shared)
    )
    register(
        site,
        "reads",
        """
print(open("/root/.ssh/id").read(), open("/shared/given").read())
try:
    open("/root/.ssh/id", "w")
except OSError as error:
    print(error.strerror)
with open("/notes/n", "a") as file:
    file.write("x")
print(open("/notes/n").read())
""",
        f"volumes=['{site.shared}:/shared:ro']",
    )
    for times in (1, 2):
        run = site.submit("reads")
        shown = site.wait_for(run)
        assert text(site, run) == f"a key read me\nRead-only file system\n{'x' * times}\n", shown
    engine.docker("volume", "rm", "-f", "notes", code=None)


def test_a_failed_container_can_be_kept(site: Site, engine: Engine) -> None:
    start(site, "--keep", "failed")
    register(site, "broken", "raise SystemExit(4)")
    register(site, "sound", "pass")
    kept, gone = site.submit("broken"), site.submit("sound")
    site.wait_for(kept, "failed")
    site.wait_for(gone, "completed")
    until(lambda: engine.containers() == [f"flowagent-{kept}.1-kept"])
    assert not engine.inspect(f"flowagent-{kept}.1-kept")["State"]["Running"]


def test_a_process_agent_leaves_it_alone_and_explain_says_so(site: Site) -> None:
    site.start()
    register(site, "boxed", "print('here')")
    run = site.submit("boxed")
    said = site.command("explain", run).stdout
    assert "runs process flows only; the run needs docker" in said
    assert "flowagent start --runner docker" in said
    start(site)
    site.wait_for(run, "completed")


def test_twenty_at_a_time(site: Site, engine: Engine) -> None:
    start(site, "--limit", "20", "--lease", "40s")
    register(site, "many", "print('a' * 1000); time.sleep(1)")
    runs = [site.submit("many") for _ in range(20)]
    for run in runs:
        assert site.wait_for(run, timeout=100)["state"] == "completed"
        assert text(site, run) == "a" * 1000 + "\n"
    until(lambda: engine.containers() == [])


def test_an_image_without_flowagent_cannot_fetch(yard: Site) -> None:
    register(yard, "lacking", "pass", "resolve='container'")
    shown = yard.wait_for(yard.submit("lacking"))
    assert shown["state"] == "crashed" and "has no flowagent" in shown["reason"], shown
