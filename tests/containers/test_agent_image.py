"""The agent's own image, built by its Dockerfile as it is: an agent in a container, and flows that fetch
themselves in theirs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pip
import pytest
from tests.containers import images
from tests.containers.conftest import start
from tests.containers.machinery import PYTHON, Engine
from tests.containers.test_runs import text
from tests.e2e.harness import Site, until
from tests.gitservers import Repository, SshServer, open_directory, sshd

pytestmark = pytest.mark.slow  # the image takes a minute to build

ROOT = Path(__file__).parents[2]
IMAGE, BASE = "flowagent:test", "base/agent:3.11"
OWNER = 1000
FLOW = """
import os
from flowagent import Flow, task
from flowagent.run_configs import DockerRun, LocalRun
from flowagent.storage import Git, Local

@task
def work():
    print("out of", os.path.basename(__file__), os.path.exists("/root/.ssh/id_ed25519"))

with Flow({name!r}, storage={storage}, run_config={config}) as flow:
    work()
"""


def wheels() -> Path:
    """flowagent's dependencies, once for each state of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    cache = (
        Path.home() / ".cache/flowagent-tests" / f"wheels-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    )
    if not cache.is_dir():
        temporary = cache.with_suffix(f".{os.getpid()}")
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "-w",
            temporary,
            f"{ROOT}[postgresql]",
            "hatchling",
        ]
        subprocess.run(command, check=True)
        temporary.rename(cache)
    return cache


@pytest.fixture(scope="module")
def image(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("image")
    images.with_pip(root / "base.tar", Path(pip.__file__).parent)
    engine.docker("import", str(root / "base.tar"), BASE)
    context = root / "context"
    shutil.copytree(wheels(), context / "wheels")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    for name in listed.stdout.rstrip("\0").split("\0"):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, context / name)
    with (context / ".dockerignore").open("a") as file:
        file.write("!wheels\n")
    arguments = {"BASE": BASE, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/src/wheels", "EXTRAS": "postgresql"}
    engine.docker(
        "build", "-q", "--network=none", "-t", IMAGE, "-f", str(context / "docker/Dockerfile"),
        *(part for item in arguments.items() for part in ("--build-arg", "=".join(item))), str(context),
        timeout=300,
    )  # fmt: skip
    return IMAGE


@dataclass
class Boxed:
    """An agent in a container, as compose.yaml has it."""

    engine: Engine
    name: str

    def command(self, *arguments: str, code: int = 0, **options: str) -> str:
        return self.engine.docker("exec", "-i", self.name, "flowagent", *arguments, code=code, **options)

    def write(self, path: str, content: str) -> None:
        self.engine.docker("exec", "-i", self.name, "/bin/sh", "-c", f"cat > {path}", input=content)

    def run(self, name: str) -> str:
        """The id of a run that has completed."""
        run = str(json.loads(self.command("run", name, "--json"))["id"])
        until(lambda: self.state(run) not in ("scheduled", "pending", "running"), 60)
        assert self.state(run) == "completed", self.command("show", run)
        return run

    def state(self, run: str) -> str:
        return str(json.loads(self.command("show", run, "--json"))["run"]["state"])


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with open_directory() as root:
        Repository.make(
            root / "repos",
            "flows",
            flow=FLOW.format(name="by-ssh", storage="None", config="None"),
        )
        with sshd(root / "repos", root / "client" / ".ssh") as started:
            for path in (started.directory, *started.directory.iterdir()):
                os.chown(path, OWNER, OWNER)
            yield started


@pytest.fixture
def boxed(engine: Engine, image: str, server: SshServer, request: pytest.FixtureRequest) -> Iterator[Boxed]:
    name = "flowagent-agent"
    group = str(os.stat(engine.socket).st_gid)
    engine.docker(
        "run", "-d", "--name", name, "--hostname", "boxed", "--network", "host", "--init",
        "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--group-add", group,
        "-v", f"{server.directory}:/home/flowagent/.ssh:ro", "-v", f"{engine.socket}:/var/run/docker.sock",
        image, "start", "--no-hostname-label", *getattr(request, "param", ()),
    )  # fmt: skip
    try:
        until(lambda: "live" in engine.docker("exec", name, "flowagent", "agents", "--here", code=None), 60)
        yield Boxed(engine, name)
    finally:
        engine.docker("rm", "-fv", name)


@pytest.fixture
def composed(engine: Engine, image: str, server: SshServer, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """docker-compose with the file as it is, but for a key that the version of Debian does not know: name."""
    if shutil.which("docker-compose") is None:
        pytest.fail("needs docker-compose: apt-get install docker-compose")
    engine.docker("tag", image, "flowagent")
    file = tmp_path / "docker" / "compose.yaml"
    file.parent.mkdir()
    file.write_text((ROOT / "docker/compose.yaml").read_text().replace("\nname: flowagent\n", "\n"))
    environment = {
        **os.environ,
        "DOCKER_HOST": f"unix://{engine.socket}",
        "DOCKER_SOCKET": str(engine.socket),
        "DOCKER_GID": str(os.stat(engine.socket).st_gid),
        "SSH_DIR": str(server.directory),
        "COMPOSE_PROJECT_NAME": "flowagent",
    }

    def compose(*arguments: str) -> str:
        command = ["docker-compose", "-f", str(file), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        yield compose
    finally:
        compose("--profile", "docker", "down", "--volumes", "--timeout", "20")


def by_ssh(server: SshServer, config: str) -> str:
    # what follows the host is the way to the repositories
    return FLOW.format(
        name="by-ssh",
        storage="Git('flow.py', git_clone_url_secret_name='URL')",
        config=config,
    )


def test_an_agent_in_a_container_with_keys_of_its_host(boxed: Boxed, server: SshServer) -> None:
    assert boxed.engine.docker("exec", boxed.name, "id", "-u").strip() == str(OWNER)
    assert boxed.engine.docker("exec", boxed.name, "/bin/sh", "-c", "command -v ssh", code=None) == ""
    health = boxed.engine.inspect(boxed.name)["Config"]["Healthcheck"]["Test"]
    assert boxed.engine.docker("exec", boxed.name, *health[1:])
    boxed.command("secret", "set", "URL", input=server.url("flows"))
    boxed.write("/tmp/flow.py", by_ssh(server, "LocalRun()"))
    boxed.command("register", "/tmp/flow.py")
    assert "out of flow.py False" in boxed.command("logs", boxed.run("by-ssh"))


@pytest.mark.parametrize(
    "boxed", [["--runner", "docker", "--image", PYTHON, "--network", "none"]], indirect=True
)
def test_the_docker_runner_from_within_a_container(boxed: Boxed, server: SshServer, engine: Engine) -> None:
    boxed.command("secret", "set", "URL", input=server.url("flows"))
    boxed.write("/tmp/flow.py", by_ssh(server, "DockerRun()"))
    boxed.command("register", "/tmp/flow.py")
    assert "out of flow.py False" in boxed.command("logs", boxed.run("by-ssh"))
    until(lambda: engine.containers() == [])


def test_compose_starts_what_the_documentation_says(engine: Engine, composed: Callable[..., str]) -> None:
    composed("up", "-d")
    (agent,) = composed("ps", "-q").split()
    boxed = Boxed(engine, agent)
    until(lambda: "live" in engine.docker("exec", agent, "flowagent", "agents", "--here", code=None), 60)
    boxed.write("/tmp/flow.py", FLOW.format(name="f", storage="Local(stored_as_script=True)", config="None"))
    boxed.command("register", "/tmp/flow.py")
    first = boxed.run("f")
    assert "out of flow.py False" in boxed.command("logs", first)

    composed("up", "-d", "--force-recreate")  # the store and the agent's name are what they were
    (again,) = composed("ps", "-q").split()
    assert again != agent
    boxed = Boxed(engine, again)
    until(lambda: "live" in engine.docker("exec", again, "flowagent", "agents", "--here", code=None), 60)
    assert boxed.state(first) == "completed"
    assert [each["name"] for each in json.loads(boxed.command("agents", "--json"))] == ["flowagent"]

    composed("up", "-d", "docker-agent")
    until(lambda: "flowagent-docker" in boxed.command("agents"), 60)


@pytest.mark.parametrize("resolve", ["agent", "container"])
def test_keys_that_are_mounted(
    site: Site, engine: Engine, image: str, server: SshServer, tmp_path: Path, resolve: str
) -> None:
    """As documented: ``--volume ~/.ssh:/root/.ssh:ro``."""
    keys = tmp_path / "user" / ".ssh"
    shutil.copytree(server.directory, keys)
    site.environment |= {"HOME": str(keys.parent)}
    where = "/root/.ssh" if resolve == "agent" else "/home/flowagent/.ssh"
    site.command("secret", "set", "URL", input=server.url("flows"))
    site.start(
        "--runner", "docker", "--network", "host", "--image", PYTHON if resolve == "agent" else image,
        "--volume", f"~/.ssh:{where}:ro", "--volume", f"{server.directory}:/keys:ro",
    )  # fmt: skip
    env = {"FLOWAGENT_SECRET_URL": server.url("flows")} if resolve == "container" else {}
    config = f"DockerRun(resolve={resolve!r}, env={env!r})"
    if resolve == "container":  # that user cannot read root's copy
        for path in (keys, *keys.iterdir()):
            os.chown(path, OWNER, OWNER)
    site.command("register", site.write("flow.py", textwrap.dedent(by_ssh(server, config))))
    run = site.submit("by-ssh")
    shown = site.wait_for(run, timeout=60)
    assert shown["state"] == "completed", (shown["reason"], text(site, run))
    assert text(site, run) == f"out of flow.py {resolve == 'agent'}\n"
    (head,) = {attempt["revision"].partition(":")[0] for attempt in shown["attempts"]}
    assert len(head) >= 40 and "unresolved" not in head


def test_what_cannot_be_fetched_in_the_container_is_said(site: Site, image: str, server: SshServer) -> None:
    start(site, "--image", image)
    site.environment |= {"HOME": str(server.directory.parent)}
    config = "DockerRun(resolve='container', env={'FLOWAGENT_SECRET_URL': 'https://127.0.0.1:1/none.git'})"
    site.command("secret", "set", "URL", input=server.url("flows"))
    flow = FLOW.format(
        name="nowhere", storage="Git('flow.py', git_clone_url_secret_name='URL')", config=config
    )
    site.command("register", site.write("nowhere.py", flow))
    shown = site.wait_for(site.submit("nowhere"), timeout=60)
    assert shown["state"] == "crashed" and "could not be fetched" in shown["reason"], shown
