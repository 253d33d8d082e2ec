from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.forges import server, webhooks

from flowagent import FlowError, http
from flowagent.backend import Artifact, Backend, BackendContext
from flowagent.errors import BackendError, StorageNotFoundError, StorageTransientError
from flowagent.models import Json
from flowagent.secrets import SecretProvider
from flowagent.sources import SourceCache
from flowagent.storage import Webhook
from flowagent_backends import webhook
from flowagent_backends.webhook import WebhookBackend

DATA = b"\x80\x04N." * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()
SCRIPT = "from flowagent import Flow\nflow = Flow('etl')\n"
SECRET = "s3cr3t-of-the-tests"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF", 0.001)


@pytest.fixture
def environ() -> dict[str, str]:
    return {}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
async def backend(home: Path, environ: dict[str, str]) -> AsyncIterator[WebhookBackend]:
    backend = WebhookBackend(BackendContext(home, "host1", environ=environ))
    yield backend
    await backend.close()


@pytest.fixture
def shelf() -> Iterator[webhooks.Shelf]:
    stand_in = webhooks.Shelf()
    with server.serving(stand_in):
        yield stand_in


def declared(shelf: server.StandIn, *, script: bool = False, **more: Any) -> dict[str, Json]:
    build = {"url": f"{shelf.url}/flow", **more.pop("build", {})}
    get = {"url": f"{shelf.url}/flow", **more.pop("get", {})}
    method = more.pop("method", "GET")
    return Webhook(build, "PUT", get, method, stored_as_script=script, **more).to_json()


def pickle() -> Artifact:
    return Artifact("My Flow", "pickle", data=DATA, sha256=SHA256, made_with={"python": "3.12.1"})


async def fetched(backend: WebhookBackend, storage: Mapping[str, Json], directory: Path) -> dict[str, bytes]:
    directory.mkdir()
    await backend.materialise(storage, await backend.resolve(storage), directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    "more",
    [
        {"headers": {"X-Key": "${TOKEN}"}},
        {"cookies": {"session": "${TOKEN}"}},
        {"auth": ("me", "${TOKEN}")},
        {"params": {"key": "${KEPT}"}},
        {"json": {"key": "${KEPT}"}},
    ],
)
async def test_no_credential_goes_where_all_can_read_it(
    backend: WebhookBackend, home: Path, environ: dict[str, str], shelf: webhooks.Shelf, more: dict[str, Any]
) -> None:
    environ |= {"TOKEN": SECRET, "WHERE": "hooks.example:8080", "KIND": "flow"}
    SecretProvider(home, {}).set("KEPT", SECRET)
    away = declared(shelf, script=True, get={"url": "http://${WHERE}/flow", **more})
    with pytest.raises(
        BackendError, match=r"value of (TOKEN|KEPT) would go there for all to read"
    ) as refused:
        await backend.resolve(away)
    assert SECRET not in str(refused.value)
    shelf.kept["/flow"] = SCRIPT.encode()
    here = declared(shelf, script=True, get=more)  # on loopback
    assert (await backend.resolve(here)).id
    open_ = declared(
        shelf, script=True, get={"url": "http://127.0.0.1:1/${KIND}", "params": {"a": "${KIND}"}}
    )
    with pytest.raises(StorageTransientError, match="cannot be reached"):
        await backend.resolve(open_)


@pytest.mark.parametrize(
    "more",
    [
        {"headers": {"X": "\ud800"}},
        {"params": {"x": "\ud800"}},
        {"data": {"$bytes": "x"}},
        {"data": {"$bytes": 7}},
    ],
)
async def test_what_cannot_be_sent(
    backend: WebhookBackend, shelf: webhooks.Shelf, more: dict[str, Any]
) -> None:
    storage = declared(shelf, script=True)
    storage["get_flow_request_kwargs"] |= more
    with pytest.raises(BackendError, match=r"holds what cannot be sent|would hold what is no text"):
        await backend.resolve(storage)
    assert not shelf.log


async def test_a_refusal_without_an_end(backend: WebhookBackend, shelf: webhooks.Shelf) -> None:
    shelf.fail(server.Answer(403, b"[" * 200_000, {"Content-Type": "application/json"}))
    with pytest.raises(BackendError, match=r"refuses the request \(403\)"):
        await backend.resolve(declared(shelf, script=True))


# -- pickles ---------------------------------------------------------------------------------------------


async def test_a_pickle(backend: WebhookBackend, shelf: webhooks.Shelf, tmp_path: Path) -> None:
    assert isinstance(backend, Backend)
    storage = await backend.upload(declared(shelf), pickle())
    assert shelf.kept == {"/flow": DATA}
    assert storage["artifact"] == {
        "kind": "pickle",
        "sha256": SHA256,
        "size": len(DATA),
        "made_with": {"python": "3.12.1"},
    }
    shelf.log.clear()
    revision = await backend.resolve(storage)
    assert not shelf.log  # it is pinned
    assert revision.id == f"sha256:{SHA256}"
    assert (revision.entry.kind, revision.entry.sha256) == ("pickle", SHA256)
    assert await fetched(backend, storage, tmp_path / "source") == {"flow.pickle": DATA}


async def test_a_tampered_pickle(backend: WebhookBackend, shelf: webhooks.Shelf, tmp_path: Path) -> None:
    storage = await backend.upload(declared(shelf), pickle())
    shelf.kept["/flow"] = b"evil" + DATA
    cache = SourceCache(tmp_path / "cache")
    with pytest.raises(BackendError, match=r"was changed since: register the flow again") as refused:
        await cache.acquire(backend, storage, await backend.resolve(storage))
    assert not refused.value.retryable
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]


async def test_a_pickle_that_was_never_registered(backend: WebhookBackend, shelf: webhooks.Shelf) -> None:
    with pytest.raises(BackendError, match="was never registered as a pickle"):
        await backend.resolve(declared(shelf))


async def test_another_place_is_another_source(backend: WebhookBackend, shelf: webhooks.Shelf) -> None:
    """Or who knows a digest would have what only others may fetch."""
    storage = await backend.upload(declared(shelf), pickle())
    other = {**storage, "get_flow_request_kwargs": {"url": "https://elsewhere.example/"}}
    assert (await backend.resolve(other)).key != (await backend.resolve(storage)).key


# -- scripts ---------------------------------------------------------------------------------------------


async def test_a_script(backend: WebhookBackend, shelf: webhooks.Shelf, tmp_path: Path) -> None:
    script = tmp_path / "my etl.py"
    script.write_text(SCRIPT)
    storage = await backend.upload(declared(shelf, script=True), Artifact("etl", "script", path=script))
    assert shelf.kept == {"/flow": SCRIPT.encode()}
    assert storage["artifact"]["entry"] == "my etl.py"
    revision = await backend.resolve(storage)
    assert (revision.entry.kind, revision.entry.path, revision.entry.sha256) == ("script", "my etl.py", None)
    assert revision.id == f"sha256:{hashlib.sha256(SCRIPT.encode()).hexdigest()}"
    assert await fetched(backend, storage, tmp_path / "source") == {"my etl.py": SCRIPT.encode()}


async def test_a_script_of_a_given_path(
    backend: WebhookBackend, shelf: webhooks.Shelf, tmp_path: Path
) -> None:
    (tmp_path / "other.py").write_text("other = 1\n")
    storage = declared(shelf, script=True, flow_script_path=tmp_path / "other.py")
    storage = await backend.upload(storage, Artifact("etl", "script", path=tmp_path / "gone.py"))
    assert shelf.kept == {"/flow": b"other = 1\n"}
    assert storage["artifact"]["entry"] == "other.py"
    with pytest.raises(BackendError, match=r"script .*gone\.py of flow 'etl' cannot be read: No such file"):
        await backend.upload(
            declared(shelf, script=True), Artifact("etl", "script", path=tmp_path / "gone.py")
        )
    with pytest.raises(BackendError, match=r"comes from no file; name its script with flow_script_path="):
        await backend.upload(declared(shelf, script=True), Artifact("etl", "script"))


async def test_edits_reach_scripts(backend: WebhookBackend, shelf: webhooks.Shelf, tmp_path: Path) -> None:
    storage = declared(shelf, script=True)
    shelf.kept["/flow"] = b"first = 1\n"
    first = await backend.resolve(storage)
    shelf.kept["/flow"] = b"second = 2\n"
    second = await backend.resolve(storage)
    assert second.id != first.id
    for revision, content in ((first, b"first = 1\n"), (second, b"second = 2\n")):
        directory = tmp_path / revision.id
        directory.mkdir()
        await backend.materialise(storage, revision, directory)
        assert (directory / "flow.py").read_bytes() == content


async def test_nothing_is_downloaded_twice(
    backend: WebhookBackend, shelf: webhooks.Shelf, tmp_path: Path
) -> None:
    storage = declared(shelf, script=True)
    shelf.kept["/flow"] = SCRIPT.encode()
    await fetched(backend, storage, tmp_path / "source")
    assert len(shelf.log) == 1
    await fetched(backend, storage, tmp_path / "again")
    assert len(shelf.log) == 2
    assert shelf.log[1].headers["if-none-match"] == f'"{hashlib.sha256(SCRIPT.encode()).hexdigest()[:12]}"'


@pytest.mark.parametrize("tags", [True, False])
async def test_a_script_that_was_not_kept(
    backend: WebhookBackend,
    shelf: webhooks.Shelf,
    tmp_path: Path,
    tags: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shelf.tags = tags
    monkeypatch.setattr(webhook, "MOST_KEPT", 10)
    shelf.kept |= {"/flow": SCRIPT.encode(), "/other": b"x" * 20}
    storage = declared(shelf, script=True)
    revision = await backend.resolve(storage)
    await backend.resolve(declared(shelf, script=True, get={"url": f"{shelf.url}/other"}))
    assert (await backend.resolve(storage)).id == revision.id
    (tmp_path / "source").mkdir()
    await backend.materialise(storage, revision, tmp_path / "source")
    assert (tmp_path / "source" / "flow.py").read_text() == SCRIPT
    backend._scripts.clear()
    shelf.kept["/flow"] = b"edited = 1\n"
    with pytest.raises(StorageTransientError, match="gives another script than a moment ago"):
        await backend.materialise(storage, revision, tmp_path / "source")


async def test_a_hundred_runs_are_two_requests(
    backend: WebhookBackend, shelf: webhooks.Shelf, tmp_path: Path
) -> None:
    storage = declared(shelf, script=True)
    shelf.kept["/flow"] = SCRIPT.encode()
    cache = SourceCache(tmp_path / "cache")
    found = set()

    async def run() -> None:
        found.add(await cache.acquire(backend, storage, await backend.resolve(storage)))

    async with anyio.create_task_group() as group:
        for _ in range(100):
            group.start_soon(run)
    assert len(found) == 1
    assert len(shelf.log) <= 2


@pytest.mark.parametrize(
    "change",
    [
        {"artifact": {"kind": "script", "sha256": SHA256, "size": 1, "entry": "../../evil.py"}},
        {"artifact": {"kind": "script", "sha256": SHA256, "size": 1, "entry": ".."}},
        {"get_flow_request_kwargs": {"url": "http://x", "verify": "/etc/passwd"}},
        {"get_flow_request_http_method": "CONNECT"},
        {"unknown": 1},
    ],
)
async def test_a_declaration_from_the_store_is_not_trusted(
    backend: WebhookBackend, shelf: webhooks.Shelf, tmp_path: Path, change: dict[str, Any]
) -> None:
    shelf.kept["/flow"] = b"x = 1\n"
    with pytest.raises(BackendError, match=r"is wrong.*; register it again"):
        await fetched(backend, declared(shelf, script=True) | change, tmp_path / "source")
    assert not list(tmp_path.rglob("evil.py"))


# -- templates -------------------------------------------------------------------------------------------


async def test_templates_at_any_depth(
    backend: WebhookBackend, shelf: webhooks.Shelf, home: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    environ |= {"PLACE": "flow", "BOTH": "of the environment"}
    SecretProvider(home, {}).set("TOKEN", SECRET)
    SecretProvider(home, {}).set("BOTH", "of the secrets")
    storage = declared(
        shelf,
        script=True,
        method="POST",
        get={
            "url": shelf.url + "/${PLACE}",
            "headers": {
                "Authorization": "Bearer ${TOKEN}",
                "X-Both": "${BOTH}",
                "X-Text": "$5, $$5, $${TOKEN} $x",
            },
            "params": {"a": "${TOKEN} &", "n": 5},
            "json": {"deep": [{"er": "${BOTH}/${PLACE}"}, "${TOKEN}", 5, None, True], "${PLACE}": "$"},
            "cookies": {"session": "${PLACE}"},
        },
    )
    shelf.kept["/flow"] = SCRIPT.encode()
    assert await fetched(backend, storage, tmp_path / "source") == {"flow.py": SCRIPT.encode()}
    asked = shelf.log[0]
    assert asked.token == SECRET
    assert asked.headers["x-both"] == "of the environment"
    assert asked.headers["x-text"] == "$5, $5, ${TOKEN} $x"
    assert asked.headers["cookie"] == "session=flow"
    assert asked.query == {"a": f"{SECRET} &", "n": "5"}
    body = {"deep": [{"er": "of the environment/flow"}, SECRET, 5, None, True], "${PLACE}": "$"}
    assert json.loads(asked.body) == body
    assert SECRET not in json.dumps(storage)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text() and
                path.name != "TOKEN"]  # fmt: skip


async def test_a_template_without_a_value(backend: WebhookBackend, shelf: webhooks.Shelf) -> None:
    storage = declared(shelf, get={"headers": {"X": "${GONE}"}}, script=True)
    with pytest.raises(BackendError) as missing:
        await backend.resolve(storage)
    assert "${GONE} in get_flow_request_kwargs (headers.X) is neither a variable nor a secret" in str(
        missing.value
    )
    assert "flowagent secret set GONE" in str(missing.value)
    assert not shelf.log


async def test_our_own_variables_are_not_for_sale(
    backend: WebhookBackend, shelf: webhooks.Shelf, environ: dict[str, str]
) -> None:
    environ |= {"FLOWAGENT_STORE": f"postgresql://me:{SECRET}@db/x", "FLOWAGENT_SECRET_TOKEN": SECRET}
    for name in ("FLOWAGENT_STORE", "FLOWAGENT_SECRET_TOKEN"):
        storage = declared(shelf, get={"headers": {"X": f"${{{name}}}"}}, script=True)
        with pytest.raises(BackendError, match="is neither a variable nor a secret here"):
            await backend.resolve(storage)
    shelf.kept["/flow"] = b""
    await backend.resolve(declared(shelf, get={"headers": {"X": "${TOKEN}"}}, script=True))
    assert shelf.log[0].headers["x"] == SECRET


async def test_line_breaks_after_values(backend: WebhookBackend, shelf: webhooks.Shelf, home: Path) -> None:
    SecretProvider(home, {}).set("TOKEN", f"{SECRET}\n")
    SecretProvider(home, {}).set("EVIL", "x\r\nX-Evil: 1")
    shelf.kept["/flow"] = b""
    get = {"headers": {"Authorization": "Bearer ${TOKEN}"}, "data": "${TOKEN}"}
    await backend.resolve(declared(shelf, get=get, method="POST", script=True))
    assert (shelf.log[0].token, shelf.log[0].body) == (SECRET, f"{SECRET}\n".encode())
    with pytest.raises(BackendError, match="header X would hold a line break"):
        await backend.resolve(declared(shelf, get={"headers": {"X": "${EVIL}"}}, script=True))


# -- requests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "body", "media"),
    [
        ({"json": {"a": [1]}}, b'{"a": [1]}', "application/json"),
        ({"data": {"a": "b c", "d": ["1", "2"]}}, b"a=b+c&d=1&d=2", "application/x-www-form-urlencoded"),
        ({"data": "text"}, b"text", None),
        ({"data": b"\xff\x00"}, b"\xff\x00", None),
        ({"json": {}, "headers": {"content-type": "application/x-own"}}, b"{}", "application/x-own"),
        ({}, b"", None),
    ],
)
async def test_bodies(
    backend: WebhookBackend,
    shelf: webhooks.Shelf,
    arguments: dict[str, Any],
    body: bytes,
    media: str | None,
) -> None:
    shelf.kept["/flow"] = b""
    await backend.resolve(declared(shelf, get=arguments, method="POST", script=True))
    assert (shelf.log[0].body, shelf.log[0].headers.get("content-type")) == (body, media)


async def test_users_and_passwords(
    backend: WebhookBackend, shelf: webhooks.Shelf, environ: dict[str, str]
) -> None:
    environ["PASSWORD"] = SECRET
    shelf.tokens[f"me:{SECRET}"] = {"read"}
    shelf.kept["/flow"] = b""
    await backend.resolve(declared(shelf, get={"auth": ("me", "${PASSWORD}")}, script=True))
    inside = {
        "url": shelf.url.replace("http://", "http://me:${PASSWORD}@") + "/flow?a=1",
        "params": {"b": "2"},
    }
    await backend.resolve(declared(shelf, get=inside, script=True))
    assert shelf.log[1].target == "/flow?a=1&b=2"
    del shelf.tokens[f"me:{SECRET}"]
    shelf.tokens["other"] = set()
    with pytest.raises(BackendError) as refused:
        await backend.resolve(declared(shelf, get=inside, script=True))
    assert str(refused.value) == (
        f"Webhook: {shelf.url}/flow refuses the request (403: no access with me:****); "
        "check the value of PASSWORD"
    )


async def test_redirects(backend: WebhookBackend, shelf: webhooks.Shelf, environ: dict[str, str]) -> None:
    """To another host, as those of stores to signed addresses: without what is for this one."""
    environ["TOKEN"] = SECRET
    other = webhooks.Shelf()
    with server.serving(other):
        other.kept["/signed"] = SCRIPT.encode()
        go = server.Answer(302, b"", {"Location": f"{other.url}/signed?sig=1"})
        headers = {"Authorization": "Bearer ${TOKEN}", "X-Key": SECRET, "Accept": "text/plain"}
        shelf.fail(go)
        await backend.resolve(declared(shelf, get={"headers": headers}, script=True))
        assert shelf.log[0].headers["x-key"] == shelf.log[0].token == SECRET
        assert "x-key" not in other.log[0].headers
        assert other.log[0].token is None
        assert other.log[0].headers["accept"] == "text/plain"
        shelf.fail(go)
        with pytest.raises(BackendError, match=r"/flow answers 302; check the storage's arguments"):
            await backend.resolve(declared(shelf, get={"allow_redirects": False}, script=True))
        shelf.fail(server.Answer(307, b"", {"Location": f"{other.url}/flow"}))
        with pytest.raises(BackendError, match="redirects to another host"):
            await backend.upload(declared(shelf), pickle())
        assert "/flow" not in other.kept


# -- faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (400, BackendError, r"answers 400; check the storage's arguments"),
        (401, BackendError, r"refuses the request \(401\); give it credentials, as \$\{NAME\}"),
        (404, StorageNotFoundError, r"has no such flow \(404\); register it again"),
        (410, StorageNotFoundError, r"has no such flow \(410\)"),
        (429, StorageTransientError, "answers 429; try again later"),
        (503, StorageTransientError, "answers 503; try again later"),
        (204, BackendError, "answers 204"),
    ],
)
async def test_refusals(
    backend: WebhookBackend,
    shelf: webhooks.Shelf,
    tmp_path: Path,
    status: int,
    kind: type[BackendError],
    message: str,
) -> None:
    storage = await backend.upload(declared(shelf), pickle())
    shelf.fail(server.Answer(status, b"<h1>\nno\n</h1>"), times=99)
    with pytest.raises(kind, match=message) as refused:
        await fetched(backend, storage, tmp_path / "source")
    assert str(refused.value).startswith(f"Webhook: {shelf.url}/flow ")
    assert refused.value.retryable == (kind is StorageTransientError)
    assert not list((tmp_path / "source").iterdir())
    with pytest.raises(kind, match=message):
        await backend.resolve({**storage, "stored_as_script": True, "artifact": None})
    if status != 204:
        with pytest.raises(kind, match=message):
            await backend.upload(declared(shelf), pickle())


async def test_a_value_that_comes_back_is_not_shown(
    backend: WebhookBackend, shelf: webhooks.Shelf, environ: dict[str, str]
) -> None:
    environ["TOKEN"] = "s3cret-value"
    storage = declared(shelf, script=True)
    storage["get_flow_request_kwargs"]["headers"] = {"Authorization": "Bearer ${TOKEN}"}
    shelf.fail(server.Answer(400, {"error": f"{'no ' * 64}such token: s3cret-value"}))
    with pytest.raises(BackendError, match=r"no no") as refused:
        await backend.resolve(storage)
    assert "s3cret" not in str(refused.value)


async def test_what_may_be_repeated_is(backend: WebhookBackend, shelf: webhooks.Shelf) -> None:
    shelf.kept["/flow"] = b""
    for method in ("GET", "POST"):
        shelf.fail(server.Answer(503), times=2)
        await backend.resolve(declared(shelf, method=method, script=True))
    shelf.fail(server.Answer(503), times=2)
    await backend.upload(declared(shelf), pickle())  # PUT
    shelf.log.clear()
    shelf.fail(server.Answer(503), times=2)
    posted = {**declared(shelf), "build_request_http_method": "POST"}
    with pytest.raises(StorageTransientError, match="503"):
        await backend.upload(posted, pickle())
    assert len(shelf.log) == 1


async def test_a_body_that_is_cut_off(backend: WebhookBackend, shelf: webhooks.Shelf, tmp_path: Path) -> None:
    storage = await backend.upload(declared(shelf), pickle())
    shelf.fail(server.Answer(200, DATA, cut=100))
    assert await fetched(backend, storage, tmp_path / "source") == {"flow.pickle": DATA}
    shelf.fail(server.Answer(200, DATA, cut=100), times=99)
    with pytest.raises(StorageTransientError, match=r"/flow cannot be reached"):
        await fetched(backend, storage, tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


async def test_a_timeout(backend: WebhookBackend, shelf: webhooks.Shelf) -> None:
    shelf.fail(server.Answer(200, wait=2))
    with pytest.raises(StorageTransientError, match="it did not answer in time"):
        await backend.resolve(declared(shelf, get={"timeout": 0.2}, script=True))


async def test_sizes(backend: WebhookBackend, home: Path, shelf: webhooks.Shelf, tmp_path: Path) -> None:
    small = WebhookBackend(BackendContext(home, "host1", environ={}, max_source=100))
    storage = await backend.upload(declared(shelf), pickle())
    with pytest.raises(BackendError, match="sends more than 100 bytes"):
        await fetched(small, storage, tmp_path / "source")
    with pytest.raises(BackendError, match="sends more than 100 bytes"):
        await small.resolve({**storage, "stored_as_script": True, "artifact": None})
    await small.close()


async def test_progress(home: Path, shelf: webhooks.Shelf, tmp_path: Path) -> None:
    seen: list[tuple[str, int | None, list[int]]] = []

    @contextmanager
    def progress(what: str, total: int | None = None) -> Iterator[Any]:
        amounts: list[int] = []
        seen.append((what, total, amounts))
        yield amounts.append

    backend = WebhookBackend(BackendContext(home, "host1", environ={}, progress=progress))
    shelf.fail(server.Answer(503))
    storage = await backend.upload(declared(shelf), pickle())
    await fetched(backend, storage, tmp_path / "source")
    await backend.close()
    assert [(what, total, sum(amounts)) for what, total, amounts in seen] == [
        ("storing flow My Flow", len(DATA), len(DATA)),
        ("fetching a flow", len(DATA), len(DATA)),
    ]


# -- Dropbox ---------------------------------------------------------------------------------------------


async def test_dropbox(home: Path, backend: WebhookBackend, environ: dict[str, str], tmp_path: Path) -> None:
    stand_in = webhooks.Dropbox()
    stand_in.tokens[SECRET] = {"write"}
    environ["DBOX_OAUTH2_TOKEN"] = SECRET
    with server.serving(stand_in):
        arguments = {
            "path": "/Apps/prefect-test-app/dropbox-flow.flow",
            "mode": "overwrite",
            "autorename": False,
        }
        storage = Webhook(
            build_request_kwargs={
                "url": f"{stand_in.url}/2/files/upload",
                "headers": {
                    "Content-Type": "application/octet-stream",
                    "Dropbox-API-Arg": json.dumps(arguments),
                    "Authorization": "Bearer ${DBOX_OAUTH2_TOKEN}",
                },
            },
            build_request_http_method="POST",
            get_flow_request_kwargs={
                "url": f"{stand_in.url}/2/files/download",
                "headers": {
                    "Accept": "application/octet-stream",
                    "Dropbox-API-Arg": json.dumps({"path": arguments["path"]}),
                    "Authorization": "Bearer ${DBOX_OAUTH2_TOKEN}",
                },
            },
            get_flow_request_http_method="POST",
        ).to_json()
        stored = await backend.upload(storage, pickle())
        assert stand_in.kept == {arguments["path"]: DATA}
        assert await fetched(backend, stored, tmp_path / "source") == {"flow.pickle": DATA}
        stand_in.kept.clear()
        with pytest.raises(BackendError, match=r"/2/files/download answers 409: path/not_found/; check"):
            await fetched(backend, stored, tmp_path / "gone")
        environ["DBOX_OAUTH2_TOKEN"] = "expired"
        with pytest.raises(
            BackendError, match=r"\(401: invalid_access_token/\); check the value of DBOX_OAUTH2"
        ):
            await fetched(backend, stored, tmp_path / "expired")


# -- declarations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"build_request_kwargs": "x"}, "build_request_kwargs takes a dict with a 'url'"),
        ({"build_request_kwargs": {}}, "build_request_kwargs takes a dict with a 'url'"),
        ({"get_flow_request_kwargs": {"url": ""}}, "url takes a non-empty string"),
        (
            {"get_flow_request_kwargs": {"url": "x", "proxies": {}}},
            "has no 'proxies'; known are url, headers",
        ),
        ({"get_flow_request_kwargs": {"url": "x", "headers": ["a"]}}, "headers takes a dict of strings"),
        (
            {"get_flow_request_kwargs": {"url": "x", "headers": {"a": None}}},
            "headers takes a dict of strings",
        ),
        ({"get_flow_request_kwargs": {"url": "x", "auth": "me"}}, "auth takes a user and a password"),
        (
            {"get_flow_request_kwargs": {"url": "x", "timeout": 0}},
            "timeout takes a positive number of seconds",
        ),
        (
            {"get_flow_request_kwargs": {"url": "x", "json": {}, "data": ""}},
            "json and data exclude each other",
        ),
        ({"get_flow_request_kwargs": {"url": "x", "json": object()}}, "takes JSON data only"),
        ({"get_flow_request_kwargs": {"url": "x/${MY-TOKEN}"}}, r"holds \$\{ without a name and \}"),
        (
            {"get_flow_request_kwargs": {"url": "x", "json": [{"a": "${"}]}},
            r"holds \$\{ without a name and \}",
        ),
        ({"build_request_kwargs": {"url": "x", "data": b"y"}}, "the flow is what is sent"),
        ({"build_request_http_method": "DELETE"}, "is one of GET, PATCH, POST, PUT; got 'DELETE'"),
        ({"get_flow_request_http_method": "get\r\nX: y"}, "is one of GET, PATCH, POST, PUT"),
        ({"flow_script_path": "x.py"}, "give stored_as_script=True, too"),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], message: str) -> None:
    whole = {
        "build_request_kwargs": {"url": "https://x"},
        "build_request_http_method": "POST",
        "get_flow_request_kwargs": {"url": "https://x"},
        "get_flow_request_http_method": "GET",
    }
    with pytest.raises(FlowError, match=message):
        Webhook(**{**whole, **arguments})


@pytest.mark.parametrize("text", ["$5", "$$5", "$${X}", "$$${X}", "100$", "${A}${B}", "$", "{}", "$${"])
def test_what_is_text(text: str) -> None:
    Webhook({"url": "https://x", "headers": {"X": text}}, "POST", {"url": "https://x"}, "GET")
