"""Secrets arrive byte for byte where they are declared, and are nowhere else, also when a run is over."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.e2e.harness import Site, processes_of, until

# what interpolation, guessing of types or trimming would change (defect 20)
ODD = {
    "TILDE": "~root/x",
    "DOLLAR": "$HOME ${HOME} %(home)s {home}",
    "NUMBER": "0123e4",
    "TRUTH": "true",
    "TABLE": '{"a": [1]}',
    "SPACES": "  \t spaced out \n\n",
    "LINES": "-----BEGIN KEY-----\nMIIEvQIBADANBg\n-----END KEY-----\n",
    "UNICODE": "pässwörd-日本-🐍",
    "DOUBLE__UNDERSCORE": "quote\" and 'quote' and \\ back",
    "CRLF": "one\r\ntwo\r",
}
FLOWS = """
    import hashlib, json, os, sys, time
    from pathlib import Path
    from flowagent import Flow, Secret, context, flow, get_logger, task
    from flowagent.run_configs import LocalRun
    from flowagent.storage import Local

    NAMES = %(names)r

    @task
    def digests(**values):
        for name, value in values.items():
            print("digest", name, hashlib.sha256(value.encode()).hexdigest())

    with Flow("arrive") as arrive:
        digests(**{name: Secret(name) for name in NAMES})

    @task
    def steal():
        for name in ("UNDECLARED", "DECLARED"):
            try:
                print("got", name, hashlib.sha256(Secret(name).get().encode()).hexdigest())
            except Exception as error:
                print("refused", name, type(error).__name__, error)
        print("in the environment:", [name for name in os.environ if "SECRET" in name])
        print("in the context:", sorted(context.secrets))

    with Flow("thief", secrets=["DECLARED"]) as thief:
        steal()

    @flow(storage=Local(), secrets=["TOKEN"])
    def leaky(mark: str):
        token = Secret("TOKEN").get()
        print("plain", token)
        sys.stderr.write("on stderr " + token + "\\n")
        get_logger().warning("logged %%s", token)
        half = len(token) // 2
        os.write(1, b"split " + token[:half].encode())
        Path(mark).touch()
        while Path(mark).exists():
            time.sleep(0.02)
        os.write(1, token[half:].encode() + b"\\n")
        leaking(token)

    @task(max_retries=1)
    def leaking(token):
        raise PermissionError("no access with " + token)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """An agent with secrets from each of the places that it takes them from."""
    site = Site(tmp_path_factory.mktemp("secrets"))
    credentials = site.root / "credentials"
    credentials.mkdir()
    environment = {"CREDENTIALS_DIRECTORY": str(credentials)}
    for number, (name, value) in enumerate({**ODD, "DECLARED": "d-value", "UNDECLARED": "u-value"}.items()):
        if number % 3 == 0:
            environment[f"FLOWAGENT_SECRET_{name}"] = value
        elif number % 3 == 1:
            (credentials / name).write_bytes(value.encode())
        else:
            secret = site.home / "secrets" / name
            secret.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            secret.touch(0o600)
            secret.write_bytes(value.encode())
    site.environment.update(environment)
    site.start("--lease", "10s", "--name", "first")
    site.command("register", site.write("flows.py", FLOWS % {"names": list(ODD)}))
    yield site
    site.close()


def test_each_provider_gives_them_byte_for_byte(site: Site) -> None:
    output = site.watch("arrive")
    for name, value in ODD.items():
        assert f"digest {name} {hashlib.sha256(value.encode()).hexdigest()}" in output


def test_only_declared_ones_arrive(site: Site) -> None:
    output = site.watch("thief")
    assert "refused UNDECLARED FlowError secret 'UNDECLARED' is not available: declare it" in output
    assert f"got DECLARED {hashlib.sha256(b'd-value').hexdigest()}" in output
    assert "in the environment: []" in output
    assert "in the context: ['DECLARED']" in output


def test_a_secret_that_is_not_set_is_named(site: Site) -> None:
    script = """
        from flowagent import flow
        @flow(secrets=["NOWHERE", "NOT_HERE"])
        def needy():
            pass
    """
    site.command("register", site.write("needy.py", script))
    output = site.watch("needy", code=3)
    assert "secrets NOT_HERE, NOWHERE are not set" in output
    assert "flowagent secret set NOT_HERE" in output


@pytest.mark.parametrize("restart", [False, True], ids=["as it is", "agent killed in the middle"])
def test_the_value_is_nowhere_afterwards(site: Site, restart: bool) -> None:
    value = "tk_" + hashlib.sha256(os.urandom(8)).hexdigest()
    needles = [value.encode(), base64.b64encode(value.encode()).rstrip(b"="), value.encode().hex().encode()]
    site.command("secret", "set", "TOKEN", input=value)
    mark = site.shared / "mark"
    run = site.submit("leaky", "-p", f"mark={mark}")
    until(mark.exists)

    def whereabouts(needles: list[bytes]) -> list[str]:
        """Where the value can be seen by others: files, arguments and environments of processes."""
        found = []
        for path in site.root.rglob("*"):
            if path.is_file() and path != site.home / "secrets" / "TOKEN":
                content = path.read_bytes()
                found += [str(path) for needle in needles if needle in content]
        for pid in {*processes_of(site.home), os.getpid()}:
            for part in ("cmdline", "environ"):
                content = Path(f"/proc/{pid}/{part}").read_bytes()
                found += [f"{part} of {pid}" for needle in needles if needle in content]
        return found

    # its own output, which nobody else can read and which goes with the run, is all
    assert {Path(path).name for path in whereabouts(needles)} <= {"output"}
    agent = next(agent for agent in site.agents if agent.poll() is None)
    if restart:
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        mark.unlink()
        agent = site.start("--lease", "10s", "--name", "first")
    else:
        mark.unlink()
    shown = site.wait_for(run)
    assert shown["state"] == "failed"
    output = site.output(run)
    assert value not in output
    assert "plain ****\n" in output
    assert "on stderr ****\n" in output
    assert "logged ****" in output
    assert "split ****\n" in output
    assert output.count("PermissionError: no access with ****") >= 2  # in the traceback of each try
    assert shown["reason"] == "task leaking-1 failed: PermissionError: no access with ****"
    assert all(value not in str(task) for task in shown["tasks"])
    until(lambda: not any(Path(site.home / "agents").rglob("output")))
    assert whereabouts(needles) == []
    assert psutil.pid_exists(agent.pid)
