"""Git storage as its documentation shows it: pushed, registered, and run by an agent from a server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.harness import Site, until
from tests.gitservers import (
    HttpServer,
    Repository,
    SshServer,
    certificate,
    connect_proxy,
    git,
    http_server,
    open_directory,
    sshd,
)

# the example, word for word but for the package's name
SIDE_FILE = """\
from pathlib import Path
import flowagent
from flowagent import task, Flow
from flowagent.storage import Git
# get the path to the flow file using pathlib and __file__
# this path is dynamically populated when the flow is loaded from storage
file_path = Path(__file__).resolve().parent
# using our flow path, load the file
with open(str(file_path) + '/person.txt', 'r') as my_file:
    name = my_file.read()
@task
def say_hello(name):
    logger = flowagent.context.get("logger")
    logger.info(f"Hi {name}")
with Flow("my-hello-flow") as flow:
    say_hello(name)
# configure our flow to use `Git` storage
flow.storage = Git(flow_path="flow.py", repo='org/repo')
"""

IN_TASKS = """\
from pathlib import Path
from flowagent import Flow, task
from flowagent.storage import Git
from helpers.words import greeting
import sibling
@task
def say_hello():
    later = (Path(__file__).parent / "person.txt").read_text()
    from helpers import late
    print(greeting, later, sibling.mark, late.mark)
with Flow("in-tasks", storage=Git("flows/hello.py", repo="org/side")) as flow:
    say_hello()
with Flow("second-of-the-file", storage=Git("flows/hello.py", repo="org/side")) as other:
    say_hello()
"""


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with open_directory() as path:
        yield path


@pytest.fixture(scope="module")
def forge(root: Path) -> Iterator[HttpServer]:
    """What github.com is for the machine of these tests."""
    pem = certificate(root)
    with http_server(root / "repos", pem) as server:
        yield server


@pytest.fixture(scope="module")
def ssh(root: Path) -> Iterator[SshServer]:
    with sshd(root / "repos", root / "client" / ".ssh") as server:
        yield server


@pytest.fixture
def site(tmp_path: Path, root: Path, forge: HttpServer, ssh: SshServer) -> Iterator[Site]:
    site = Site(tmp_path)
    with connect_proxy(forge.port) as proxy:
        site.environment |= {
            "HTTPS_PROXY": f"http://127.0.0.1:{proxy}",
            "SSL_CERT_FILE": str(root / "cert.pem"),
            "HOME": str(root / "client"),
            "NO_PROXY": "",
        }
        for name in ("no_proxy", "GIT_SSL_CAINFO"):
            site.environment.pop(name, None)
        yield site
        site.close()


def test_loading_additional_files(site: Site, root: Path) -> None:
    repository = Repository.make(root / "repos", "org/repo")
    script = repository.write("flow.py", SIDE_FILE)
    repository.write("person.txt", "Marvin")
    commit = repository.commit()
    site.command("register", script)
    agent = site.start()
    assert "Hi Marvin" in site.watch("my-hello-flow")
    repository.write("person.txt", "Trillian")
    newer = repository.commit()
    printed = site.watch("my-hello-flow")
    assert "Hi Trillian" in printed and "Hi Marvin" not in printed
    runs = [run["id"] for run in json.loads(site.command("runs", "--json").stdout)]
    assert {site.show(run)["attempts"][0]["revision"] for run in runs} == {commit, newer}
    assert newer in "".join(site.command("show", run).stdout for run in runs)
    sources = json.loads(site.command("cache", "ls", "--json").stdout)
    assert [entry["revision"] for entry in sources["sources"]] == [commit, newer]
    assert [entry["what"] for entry in sources["mirrors"]] == [
        "Git: github.com/org/repo (history)",  # that the flow is there was looked up when it was registered
        "Git: github.com/org/repo",
    ]
    assert "github.com/org/repo" in site.command("cache", "ls").stdout
    whole = "all sources are as they were published, and all mirrors whole\n"
    assert site.command("cache", "verify").stdout == whole
    for pack in site.home.glob("mirrors/*/objects/pack/*.pack"):
        pack.chmod(0o600)
        pack.write_bytes(pack.read_bytes()[:-30])
    assert site.command("cache", "verify", code=1).stdout.startswith("discarded 2 mirrors that had changed;")
    repository.write("person.txt", "Zaphod")
    repository.commit()
    assert "Hi Zaphod" in site.watch("my-hello-flow")
    assert site.command("cache", "verify").stdout == whole
    assert site.stop(agent) == 0
    assert site.command("cache", "prune").stdout.startswith("removed 3 sources and 1 mirror,")
    assert json.loads(site.command("cache", "ls", "--json").stdout) == {"sources": [], "mirrors": []}


def test_side_files_and_modules_in_tasks(site: Site, root: Path) -> None:
    repository = Repository.make(root / "repos", "org/side")
    script = repository.write("flows/hello.py", IN_TASKS)
    repository.write("flows/person.txt", "Ford")
    repository.write("flows/sibling.py", "mark = 'beside'\n")
    repository.write("helpers/__init__.py", "")
    repository.write("helpers/words.py", "greeting = 'Hi'\n")
    repository.write("helpers/late.py", "mark = 'late'\n")
    repository.commit()
    site.environment["PYTHONPATH"] = str(repository.work)  # as whoever works there has it
    site.command("register", script)
    del site.environment["PYTHONPATH"]
    site.start()
    for name in ("in-tasks", "second-of-the-file"):
        assert "Hi Ford beside late" in site.watch(name)


def test_a_copy_of_its_own(site: Site, root: Path) -> None:
    repository = Repository.make(root / "repos", "org/private")
    script = repository.write(
        "flow.py",
        "from pathlib import Path\n"
        "from flowagent import flow\n"
        "from flowagent.storage import Git\n"
        "here = Path(__file__).parent\n"
        "def counted():\n"
        "    count = here / 'data' / 'count'\n"
        "    count.write_text(str(int(count.read_text()) + 1))\n"
        "    (here / 'new').mkdir()\n"
        "    print('count', count.read_text())\n"
        "own = flow(name='own', storage=Git('flow.py', 'org/private', checkout='private'))(counted)\n"
        "shared = flow(name='shared', storage=Git('flow.py', 'org/private'))(counted)\n",
    )
    repository.write("data/count", "1")
    repository.commit()
    site.command("register", script)
    site.start()
    for _ in range(2):
        assert "count 2" in site.watch("own")
    assert "Error" in site.watch("shared", code=1)
    (source,) = (site.home / "sources").glob("*/source")
    assert (source / "data/count").read_text() == "1"
    until(lambda: not list((site.home / "agents").glob("*/runs/[!.]*")))  # but those made ahead


def test_registering_from_a_work_tree(site: Site, root: Path, ssh: SshServer) -> None:
    repository = Repository.make(root / "repos", "org/tree")
    code = "from flowagent import flow\n@flow\ndef tree():\n    print('from', __file__)\n"
    script = repository.write("flows/tree.py", code)
    done = site.command("register", "--git", script, code=1)
    assert "flows/tree.py is not tracked" in done.stderr
    repository.commit()
    repository.git("remote", "set-url", "origin", "https://github.com/org/tree.git")
    repository.git("config", "remote.origin.pushurl", str(repository.bare))
    repository.git("update-ref", "-d", "refs/remotes/origin/main")
    done = site.command("register", "--git", script)
    assert "registered tree version 1" in done.stdout and "origin/main was never pushed to" in done.stderr
    repository.git("update-ref", "refs/remotes/origin/main", "HEAD")
    repository.write("flows/tree.py", code.replace("'from'", "'newer'"))
    repository.commit("m", False)
    repository.write("flows/tree.py", code.replace("'from'", "'newest'"))
    done = site.command("register", "--git", script)
    assert "1 commit is not pushed to origin/main yet; run: git push" in done.stderr
    assert "not committed (flows/tree.py); agents do not see them" in done.stderr
    site.start()
    assert f"from {site.home / 'sources'}" in site.watch("tree")
    (known,) = json.loads(site.command("flows", "--json").stdout)
    storage = known["storage"]
    assert (storage["repo"], storage["repo_host"]) == ("org/tree", "github.com")
    assert (storage["branch_name"], storage["flow_path"]) == ("main", "flows/tree.py")
    assert "Git org/tree flows/tree.py" in site.command("flows").stdout
    repository.git("remote", "set-url", "origin", "git@github.com:org/tree.git")
    done = site.command("register", "--git", script, code=1)
    assert "the host key of" in done.stderr or "cannot be reached" in done.stderr
    repository.git("remote", "set-url", "origin", str(repository.bare))
    done = site.command("register", "--git", script, code=1)
    assert "git_clone_url_secret_name='CLONE_URL'" in done.stderr
    outside = site.write("outside.py", code)
    assert "is in no Git work tree" in site.command("register", "--git", outside, code=1).stderr


def test_a_deploy_key_of_the_configuration(site: Site, root: Path, ssh: SshServer) -> None:
    """Two machines' worth: registration has no key, the agent has it, over ssh without an ssh client."""
    repository = Repository.make(root / "repos", "org/keys")
    script = repository.write(
        "flow.py",
        "from flowagent import flow\nfrom flowagent.storage import Git\n"
        "@flow(storage=Git('flow.py', git_clone_url_secret_name='CLONE_URL'))\n"
        "def keyed():\n    print('hello over ssh')\n",
    )
    repository.commit()
    site.command("register", script)
    config = site.write(
        "agent.toml",
        f'[ssh."127.0.0.1{ssh.root}/org/keys"]\nkey = "{ssh.directory}/id_ed25519"\n'
        f'known_hosts = ["{ssh.known_host}"]\n',
    )
    env = {
        "FLOWAGENT_SECRET_CLONE_URL": ssh.url("org/keys"),
        "HOME": str(site.root),
        "PATH": os.environ["PATH"],
    }
    site.start("--config", str(config), **env)
    assert "hello over ssh" in site.watch("keyed")


def test_what_cannot_be_fetched_ends_the_run_with_one_line(site: Site, root: Path) -> None:
    repository = Repository.make(root / "repos", "org/gone")
    script = repository.write(
        "flow.py",
        "from flowagent import flow\nfrom flowagent.storage import Git\n"
        "@flow(storage=Git('flow.py', 'org/gone', branch_name='main'))\ndef gone():\n    pass\n",
    )
    repository.commit()
    site.command("register", script)
    site.start()
    git("branch", "-m", "main", "trunk", cwd=repository.bare)
    printed = site.watch("gone", code=3)
    assert (
        "the flow could not be fetched: Git: github.com/org/gone has no branch 'main'; there are trunk"
        in printed
    )


def test_a_slow_fetch_is_told_of_and_a_token_is_not(site: Site, root: Path) -> None:
    token = "t0p-s3cret-t0ken"
    repository = Repository.make(root / "repos", "org/slow", flow="1")
    repository.write("large.bin", os.urandom(300_000))
    repository.write(
        "flow.py",
        "from flowagent import flow\nfrom flowagent.storage import Git\n"
        "@flow(storage=Git('flow.py', git_clone_url_secret_name='CLONE_URL'))\n"
        "def slow():\n    print('done')\n",
    )
    repository.commit()
    with http_server(root / "repos", logins={"me": token}, duration=12) as server:
        site.environment["NO_PROXY"] = "127.0.0.1"
        site.command("register", repository.work / "flow.py")
        secret = {"FLOWAGENT_SECRET_CLONE_URL": server.url("org/slow", f"me:{token}")}
        agent = site.start("--log-level", "debug", **secret)
        assert "done" in site.watch("slow")
        assert site.stop(agent) == 0
        told = [
            line for line in map(json.loads, site.log(agent).splitlines()) if line["event"] == "still at work"
        ]
        assert told and told[0]["what"].endswith("/org/slow") and told[0]["seconds"] >= 10
        server.logins["me"] = "another"
        repository.commit(flow="2")
        agent = site.start("--log-level", "debug", **secret)
        assert "access is refused" in site.watch("slow", code=3)
    for file in site.home.rglob("*"):
        if file.is_file():
            assert token.encode() not in file.read_bytes(), file
    assert token not in site.log(agent)
