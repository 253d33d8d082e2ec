"""Flows in object stores, from their registration to their results, by the command line and a real agent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anyio
import cloudpickle
import pytest
from benches import AZURE_KEY, BENCHES, AzureBench, Bench
from tests.e2e.harness import Site
from tests.gate import gate

from flowagent import store as stores
from flowagent.models import State
from flowagent.store.protocol import Store
from flowagent.submission import submit

FLOW = """
from pathlib import Path
from flowagent import Flow, task
from flowagent.storage import {type}

@task
def where():
    print("as registered", __name__, __file__)
    return [1, 2, 3]

@task
def total(numbers):
    return {{"total": sum(numbers)}}

flow = Flow("{name}", storage={storage})
with flow:
    total(where())
"""
BUNDLED = """
from pathlib import Path
from flowagent import flow
from flowagent.storage import {type}
from helpers.greetings import greeting

@flow(storage={storage})
def bundled(who="you"):
    query = (Path(__file__).parent / "sql" / "hello.sql").read_text()
    print(greeting(who), "/", query)
    return query
"""


WAITING = [state for state in State if not state.terminal]


class Shop:
    """A site whose agent and commands use one bench."""

    def __init__(self, site: Site, bench: Bench) -> None:
        self.site = site
        self.bench = bench
        site.environment.update(bench.environment)
        self.agent = site.start("--limit", "8")

    def register(self, name: str, **options: Any) -> dict[str, Any]:
        storage = self.bench.storage(**options)
        given = {key: value for key, value in storage.to_json().items() if key in storage.fields and value}
        given.pop("artifact", None)
        call = f"{storage.type}({', '.join(f'{key}={value!r}' for key, value in given.items())})"
        text = (BUNDLED if "include" in options else FLOW).format(name=name, type=storage.type, storage=call)
        script = self.site.write(f"{name}/flow.py", text)
        self.site.command("register", script)
        return self.spec(name)

    def spec(self, name: str) -> dict[str, Any]:
        async def ask(store: Store) -> dict[str, Any]:
            return (await store.flow(name)).spec.to_json()

        return stores.run(f"sqlite:///{self.site.home}/flowagent.db", ask)

    def result(self, run: str, *options: str) -> str:
        return self.site.command("result", run, *options).stdout


@pytest.fixture(scope="module", params=sorted(BENCHES))
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    kind, server = BENCHES[request.param]
    root = tmp_path_factory.mktemp("shop")
    with gate(request.getfixturevalue(server)) as opened:
        site = Site(root)
        site.home.mkdir()
        try:
            yield Shop(site, kind(opened.target, site.home, opened))
        finally:
            site.close()


def test_a_pickle_from_registration_to_result(shop: Shop) -> None:
    spec = shop.register("as a pickle")
    storage, key = spec["storage"], shop.bench.key_field
    assert storage[key].startswith("as-a-pickle/")
    assert cloudpickle.loads(shop.bench.read(storage[key])).name == "as a pickle"
    assert spec["result"]["type"] == f"{shop.bench.kind}Result"
    run = shop.site.submit("as a pickle")
    shown = shop.site.wait_for(run)
    assert shown["state"] == "completed"
    assert shown["attempts"][-1]["revision"] == f"sha256:{storage['artifact']['sha256']}"
    kept = {task["task"]: task["result"] for task in shown["tasks"]}["total-1"]
    assert kept["key"] == f"as-a-pickle/{run}/1/total-1"
    assert cloudpickle.loads(shop.bench.read(kept["key"])) == {"total": 6}
    assert shop.result(run, "total-1") == "{'total': 6}\n"


def test_an_edited_script_runs_the_edit(shop: Shop) -> None:
    storage = shop.register("edited", key="flows/edited.py", stored_as_script=True)["storage"]
    assert storage[shop.bench.key_field] == "flows/edited.py"
    output = shop.site.watch("edited")
    assert "as registered _flow_flow_" in output
    assert "/source/flow.py" in output
    edited = shop.bench.read("flows/edited.py").replace(b"as registered", b"as edited")
    shop.bench.write("flows/edited.py", edited)
    run = shop.site.submit("edited")
    assert shop.site.wait_for(run)["state"] == "completed"
    assert "as edited _flow_flow_" in shop.site.output(run)
    # the default result, which the script itself does not name
    assert shop.result(run, "total-1") == "{'total': 6}\n"
    assert shop.spec("edited")["result"]["type"] == f"{shop.bench.kind}Result"
    # what is there is not what was registered, so registering means it again
    shop.site.command("register", shop.site.sources / "edited" / "flow.py")
    assert b"as registered" in shop.bench.read("flows/edited.py")


def test_a_bundle_brings_its_files(shop: Shop) -> None:
    shop.site.write("bundled/sql/hello.sql", "select 'hello'")
    shop.site.write("bundled/helpers/__init__.py", "")
    shop.site.write("bundled/helpers/greetings.py", "def greeting(who):\n    return f'good day, {who}'\n")
    shop.register("bundled", include=["sql/*.sql", "helpers/"])
    for name in ("flow.py", "sql/hello.sql", "helpers/greetings.py"):
        (shop.site.sources / "bundled" / name).unlink()
    run = shop.site.submit("bundled", "-p", "who=Ford")
    assert shop.site.wait_for(run)["state"] == "completed"
    assert "good day, Ford / select 'hello'" in shop.site.output(run)
    assert shop.result(run) == "select 'hello'\n"


def test_a_tampered_pickle_is_refused(shop: Shop) -> None:
    storage = shop.register("tampered")["storage"]
    key = storage[shop.bench.key_field]
    mark = shop.site.root / "executed"
    shop.bench.write(key, f"cpathlib\nPath\n(S'{mark}'\ntR.".encode() + shop.bench.read(key))
    output = shop.site.watch("tampered", code=3)
    assert "it was changed since: register the flow again" in output
    assert not mark.exists()
    assert "registered" in shop.site.command("register", shop.site.sources / "tampered" / "flow.py").stdout
    shop.site.watch("tampered")


def test_no_secret_is_left_anywhere(shop: Shop) -> None:
    """In the agent's log, the database, and the whole home, after all of the above."""
    secrets = ("flowagent-tests-secret-key", "Eby8vdM02xNOcqFlqUwJPLlm")
    log = shop.site.log(shop.agent)
    assert not any(secret in log for secret in secrets)
    for path in shop.site.home.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in secrets), path


USES_ITS_STORAGE = """
from flowagent import flow
from flowagent.storage import Azure

storage = Azure({place!r}, connection_string={string!r})

@flow(name="with a key", storage=storage)
def keyed():
    print("from", storage, storage.connection_string)
    return storage.container
"""


@pytest.mark.parametrize("shop", ["Azure"], indirect=True)
def test_a_connection_string_in_the_code_is_left_nowhere(shop: Shop) -> None:
    """Not even where the flow's code, which is pickled with it, names the storage that has it."""
    assert isinstance(shop.bench, AzureBench)
    string = shop.bench.connection_string(shop.bench.url)
    assert AZURE_KEY in string
    script = shop.site.write("keyed/flow.py", USES_ITS_STORAGE.format(place=shop.bench.place, string=string))
    others = {"AZURE_STORAGE_CONNECTION_STRING": shop.bench.connection_string(shop.bench.url, key="d3Jvbmc=")}
    said = shop.site.command("register", script, env=others)
    run = shop.site.submit("with a key")
    assert shop.site.wait_for(run)["state"] == "completed"
    assert shop.result(run) == f"{shop.bench.place}\n"
    output = shop.site.output(run)
    assert "from Azure(container=" in output
    stored = shop.bench.read(shop.spec("with a key")["storage"]["blob_name"])
    kept = shop.bench.read(shop.site.show(run)["tasks"][-1]["result"]["key"])
    shown = json.dumps([shop.spec("with a key"), shop.site.show(run)]).encode()
    written = b"".join(path.read_bytes() for path in shop.site.home.rglob("*") if path.is_file())
    log = shop.site.log(shop.agent)
    for content in (stored, kept, shown, written, f"{said.stdout}{said.stderr}{output}{log}".encode()):
        assert content
        assert AZURE_KEY.encode() not in content


@pytest.mark.parametrize("shop", ["S3"], indirect=True)
def test_a_hundred_runs_at_once_are_one_download(shop: Shop) -> None:
    shop.register("crowded", key="flows/crowded.py", stored_as_script=True)
    shop.bench.gate.clear()

    async def ask(store: Store) -> list[str]:
        runs = [(await submit(store, "crowded", {}))[0] for _ in range(100)]
        with anyio.fail_after(90):
            while await store.runs(flow="crowded", states=WAITING):
                await anyio.sleep(0.2)
        return [str((await store.run(run.id)).state) for run in runs]

    states = stores.run(f"sqlite:///{shop.site.home}/flowagent.db", ask)
    assert states == ["completed"] * 100
    assert shop.bench.gate.count("GET", "flows/crowded.py") == 1
    assert shop.bench.gate.count("HEAD", "flows/crowded.py") == 100
