"""Storages in repositories and behind webhooks as their documentation shows them: registered, and run by an
agent that reaches stand-ins of the public services by their public names."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e.harness import Site
from tests.forges import bitbucket, codecommit, github, gitlab, proxy, server, webhooks
from tests.forges.openapi import Description
from tests.forges.repository import BareRepository
from tests.forges.server import StandIn

TOKEN = "t0ken-0f-the-tests"

# -- the examples, word for word but for the package's name; CodeCommit's imports GitLab, Webhook's lacks json

GITHUB = """
from flowagent import Flow
from flowagent.storage import GitHub
flow = Flow(
    "github-flow",
    GitHub(
        repo="org/repo",                 # name of repo
        path="flows/my_flow.py",        # location of flow file in repo
        access_token_secret="GITHUB_ACCESS_TOKEN"   # name of personal access token secret
    )
)
"""
GITLAB = """
from flowagent import Flow
from flowagent.storage import GitLab
flow = Flow(
    "gitlab-flow",
    GitLab(
        repo="org/repo",                 # name of repo
        path="flows/my_flow.py",        # location of flow file in repo
        access_token_secret="GITLAB_ACCESS_TOKEN"   # name of personal access token secret
    )
)
"""
BITBUCKET = """
from flowagent import Flow
from flowagent.storage import Bitbucket
flow = Flow(
    "bitbucket-flow",
    Bitbucket(
        project="project",                  # name of project
        repo="project.repo",                # name of repo in project
        path="flows/my_flow.py",            # location of flow file in repo
        access_token_secret="BITBUCKET_ACCESS_TOKEN"  # name of personal access token secret
    )
)
"""
CODECOMMIT = """
from flowagent import Flow
from flowagent.storage import CodeCommit
flow = Flow(
    "codecommit-flow",
    CodeCommit(
        repo="org/repo",                 # name of repo
        path="flows/my_flow.py",        # location of flow file in repo
        commit='dev',                   # branch, tag or commit id
    )
)
"""
WEBHOOK = """
import json
from flowagent import Flow
from flowagent.storage import Webhook
flow = Flow(
    "dropbox-flow",
    storage=Webhook(
        build_request_kwargs={
            "url": "https://content.dropboxapi.com/2/files/upload",
            "headers": {
                "Content-Type": "application/octet-stream",
                "Dropbox-API-Arg": json.dumps(
                    {
                        "path": "/Apps/prefect-test-app/dropbox-flow.flow",
                        "mode": "overwrite",
                        "autorename": False,
                        "strict_conflict": True,
                    }
                ),
                "Authorization": "Bearer ${DBOX_OAUTH2_TOKEN}"
            },
        },
        build_request_http_method="POST",
        get_flow_request_kwargs={
            "url": "https://content.dropboxapi.com/2/files/download",
            "headers": {
                "Accept": "application/octet-stream",
                "Dropbox-API-Arg": json.dumps(
                    {"path": "/Apps/prefect-test-app/dropbox-flow.flow"}
                ),
                "Authorization": "Bearer ${DBOX_OAUTH2_TOKEN}"
            },
        },
        get_flow_request_http_method="POST",
    )
)
"""
TASK = """
from pathlib import Path
from flowagent import task
from flowagent.results import LocalResult

@task
def read():
    here = Path(__file__)
    texts = [path.read_text() for path in sorted(here.parent.glob("*.sql"))]
    print("as", here.name, "of", here.parent.name, "with", texts)
    return {"read": texts}

with flow:
    read()
flow.result = LocalResult()  # such storages keep none
"""


@dataclass
class World:
    """A site with an agent, the public services, and a repository in each forge."""

    site: Site
    hosts: dict[str, StandIn]
    repositories: dict[str, BareRepository]

    def result(self, name: str) -> str:
        """What a run returns, as the command shows it."""
        run = self.site.submit(name)
        assert self.site.wait_for(run)["state"] == "completed", self.site.output(run)
        return self.site.command("result", run).stdout

    def revision(self) -> str:
        """What the newest run executed."""
        with closing(sqlite3.connect(self.site.home / "flowagent.db", timeout=10)) as database:
            query = "SELECT revision FROM attempt ORDER BY rowid DESC LIMIT 1"
            return str(database.execute(query).fetchone()[0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("forges")
    done = subprocess.run(
        [str(Path(__file__).parents[1] / "github-openapi")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    hosts: dict[str, StandIn] = {
        "api.github.com": github.GitHub(Description(Path(done.stdout.strip()))),
        "gitlab.com": gitlab.GitLab(),
        "api.bitbucket.org": bitbucket.Cloud(),
        "codecommit.eu-central-1.amazonaws.com": codecommit.CodeCommit(),
        "content.dropboxapi.com": webhooks.Dropbox(),
    }
    names = ("org/repo", "org/repo", "project/project.repo", "repo")
    repositories = {}
    for (host, stand_in), name in zip(hosts.items(), names, strict=False):
        git = repositories[host] = BareRepository(root / host)
        stand_in.repositories[name] = server.Kept(git, private=True)
    for stand_in in hosts.values():
        stand_in.tokens[TOKEN] = {"read", "write", "PutFile"}
    site = Site(root)
    site.environment |= {
        "GITHUB_ACCESS_TOKEN": TOKEN,
        "DBOX_OAUTH2_TOKEN": TOKEN,
        "FLOWAGENT_SECRET_GITLAB_ACCESS_TOKEN": TOKEN,
        "AWS_ACCESS_KEY_ID": TOKEN,
        "AWS_SECRET_ACCESS_KEY": "of the tests",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with proxy.internet(hosts, root) as environment:
        site.environment |= environment
        site.command("secret", "set", "BITBUCKET_ACCESS_TOKEN", input=TOKEN)
        site.start("--no-hostname-label", "--grace", "1s")
        yield World(site, hosts, repositories)
        site.close()


EXAMPLES = [
    pytest.param("github-flow", "api.github.com", GITHUB, id="GitHub"),
    pytest.param("gitlab-flow", "gitlab.com", GITLAB, id="GitLab"),
    pytest.param("bitbucket-flow", "api.bitbucket.org", BITBUCKET, id="Bitbucket"),
    pytest.param("codecommit-flow", "codecommit.eu-central-1.amazonaws.com", CODECOMMIT, id="CodeCommit"),
]


@pytest.mark.parametrize(("name", "host", "text"), EXAMPLES)
def test_a_forge(world: World, name: str, host: str, text: str) -> None:
    """Registered from a checkout, run from the forge: what is pushed there is what the next run executes."""
    site, git = world.site, world.repositories[host]
    branch = "dev" if "CodeCommit" in text else "main"
    checkout = site.write(f"{name}/flows/my_flow.py", text)
    refused = site.command("register", checkout, code=1)
    assert len(refused.stderr.splitlines()) == 1
    assert any(part in refused.stderr for part in ("empty; push", "no branch, tag or commit dev"))
    first = git.commit({"flows/my_flow.py": text}, branch=branch)
    said = site.command("register", checkout).stdout
    assert f"registered {name} version 1 (no labels): new" in said
    site.watch(name)
    assert world.revision() == first

    text += TASK
    text = text.replace(
        'path="flows/my_flow.py",', 'path="flows/my_flow.py", files=["flows/a.sql", "flows/"],'
    )
    second = git.commit(
        {"flows/my_flow.py": text, "flows/a.sql": "select 1", "flows/b.sql": "select 2"}, branch=branch
    )
    assert "version 2" in site.command("register", site.write(f"{name}/flows/my_flow.py", text)).stdout
    world.hosts[host].log.clear()
    expected = "as my_flow.py of flows with ['select 1', 'select 2']"
    for _ in range(2):
        assert expected in site.watch(name)
        assert world.revision() == second
    fetches = [asked for asked in world.hosts[host].log if b"b.sql" in asked.target.encode() + asked.body]
    assert len(fetches) <= 2  # once for all, and perhaps a question about it

    third = git.commit({"flows/b.sql": "select 3"}, branch=branch)
    assert world.result(name) == "{'read': ['select 1', 'select 3']}\n"
    assert world.revision() == third
    assert TOKEN not in site.log(site.agents[0])
    assert not [
        path for path in site.home.rglob("*") if _holds(path, TOKEN) and path.parent.name != "secrets"
    ]


@pytest.mark.parametrize(("name", "host", "text"), EXAMPLES)
def test_registering_with_upload(world: World, name: str, host: str, text: str) -> None:
    """The checkout is not pushed by hand: registering commits it."""
    site, git = world.site, world.repositories[host]
    branch = "dev" if "CodeCommit" in text else "main"
    if git.find(f"refs/heads/{branch}") is None:
        git.commit({"README": "x"}, branch=branch)
    name = f"up-{name}"
    text = (
        text.replace('"flows/my_flow.py",', '"new/uploaded.py", upload=True,').replace(name[3:], name) + TASK
    )
    script = site.write(f"{name}/anything.py", text)
    assert "version 1" in site.command("register", script).stdout
    tip = git.find(f"refs/heads/{branch}")
    assert tip is not None
    assert git.message(tip) == f"Register flow {name}"
    assert "as uploaded.py of new with []" in site.watch(name)
    assert "unchanged" in site.command("register", script).stdout
    assert git.find(f"refs/heads/{branch}") == tip


def test_a_webhook(world: World) -> None:
    site = world.site
    dropbox = world.hosts["content.dropboxapi.com"]
    assert isinstance(dropbox, webhooks.Dropbox)
    text = WEBHOOK + TASK.replace('"*.sql"', '"*.none"')
    script = site.write("dropbox/flow.py", text)
    assert "registered dropbox-flow version 1" in site.command("register", script).stdout
    assert list(dropbox.kept) == ["/Apps/prefect-test-app/dropbox-flow.flow"]
    script.unlink()
    assert "as flow.py of dropbox with []" in site.watch("dropbox-flow")
    assert world.result("dropbox-flow") == "{'read': []}\n"
    assert world.revision().startswith("sha256:")
    script.write_text(text)
    assert "unchanged" in site.command("register", script).stdout
    stored = next(iter(dropbox.kept))
    assert not [
        path for path in site.home.rglob("*") if _holds(path, TOKEN) and path.parent.name != "secrets"
    ]

    script.write_text(
        text + "# changed\nVALUE = 1\n\n@task\ndef more():\n    return VALUE\n\nwith flow:\n    more()\n"
    )
    assert "version 2" in site.command("register", script).stdout
    mark = site.root / "executed"
    dropbox.kept[stored] = f"cpathlib\nPath\n(S'{mark}'\ntR.".encode() + dropbox.kept[stored]
    assert "it was changed since: register the flow again" in site.watch("dropbox-flow", code=3)

    as_script = text.replace('"dropbox-flow"', '"dropbox-script"').replace("dropbox-flow.flow", "script.py")
    as_script = as_script.replace('_method="POST",\n    )', '_method="POST", stored_as_script=True)')
    script = site.write("dropbox/etl.py", as_script)
    assert "registered dropbox-script version 1" in site.command("register", script).stdout
    assert "as etl.py of " in site.watch("dropbox-script")
    assert world.result("dropbox-script") == "{'read': []}\n"
    kept = dropbox.kept["/Apps/prefect-test-app/script.py"]
    dropbox.kept["/Apps/prefect-test-app/script.py"] = kept.replace(b'print("as"', b'print("edited as"')
    assert "edited as etl.py of " in site.watch("dropbox-script")
    del dropbox.kept["/Apps/prefect-test-app/script.py"]
    output = site.watch("dropbox-script", code=3)
    assert "Webhook: https://content.dropboxapi.com/2/files/download answers 409: path/not_found/" in output


def _holds(path: Path, text: str) -> bool:
    try:
        return path.is_file() and text.encode() in path.read_bytes()
    except OSError:
        return False


def test_a_webhook_keeps_a_bundle(world: World) -> None:
    """The files that ``include=`` names go with the script, in one request."""
    site = world.site
    dropbox = world.hosts["content.dropboxapi.com"]
    assert isinstance(dropbox, webhooks.Dropbox)
    text = WEBHOOK.replace('"dropbox-flow"', '"bundled"').replace("dropbox-flow.flow", "bundled.tar")
    text = text.replace('_method="POST",\n    )', '_method="POST", include=["*.sql", "helpers/"])')
    text += "from helpers.greetings import greeting\n" + TASK.replace('"with", texts', "greeting, texts")
    site.write("bundled/b.sql", "select 2")
    site.write("bundled/a.sql", "select 1")
    site.write("bundled/helpers/__init__.py", "")
    site.write("bundled/helpers/greetings.py", "greeting = 'good day'")
    script = site.write("bundled/flow.py", text)
    assert "registered bundled version 1" in site.command("register", script).stdout
    assert "bundled is unchanged" in site.command("register", script).stdout
    shutil.rmtree(script.parent)
    assert "as flow.py of source good day ['select 1', 'select 2']" in site.watch("bundled")
    assert world.result("bundled") == "{'read': ['select 1', 'select 2']}\n"
    assert world.revision().startswith("sha256:")
    stored = "/Apps/prefect-test-app/bundled.tar"
    before = dropbox.kept[stored]
    dropbox.kept[stored] = before.replace(b"select 1", b"drop all")
    site.command("cache", "prune")
    assert "it was changed since: register the flow again" in site.watch("bundled", code=3)
