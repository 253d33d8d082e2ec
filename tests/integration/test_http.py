"""The HTTP layer against servers that do as they like: every byte of their answers is written here."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import ssl
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import anyio
import pytest
import trustme
from anyio.abc import SocketAttribute, SocketStream
from anyio.lowlevel import checkpoint
from anyio.streams.tls import TLSListener

import flowagent
from flowagent import http
from flowagent.errors import BackendError, StorageTransientError

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
SECRET = "s3cr3t-t0ken"


@dataclass
class Peer:
    """A server, what it was asked, and how it answers the n-th request of all."""

    port: int
    answer: Callable[[int], bytes | Callable[[SocketStream], Awaitable[None]]]
    asked: list[bytes] = field(default_factory=list)
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    async def serve(self, stream: SocketStream) -> None:
        async with stream:
            try:
                while True:
                    asked = b""
                    while not _whole(asked):
                        asked += await stream.receive()
                    self.asked.append(asked)
                    answer = self.answer(len(self.asked))
                    if callable(answer):
                        await answer(stream)
                        return
                    await stream.send(answer)
                    if b"Content-Length" not in answer and b"chunked" not in answer:
                        return
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                return


def _whole(asked: bytes) -> bool:
    head, end, body = asked.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length:" in line]
    if b"transfer-encoding: chunked" in head.lower():
        return body.endswith(b"0\r\n\r\n")
    return bool(end) and len(body) >= sum(lengths)


@asynccontextmanager
async def serving(
    *answers: bytes | Callable[[SocketStream], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[Peer]:
    """A server that gives these answers one after the other, the last one again and again."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(SocketAttribute.local_port)
    peer = Peer(port, lambda n: answers[min(n, len(answers)) - 1], scheme="https" if tls else "http")
    async with listener, anyio.create_task_group() as group:
        served = TLSListener(listener, tls, standard_compatible=False) if tls else listener
        group.start_soon(served.serve, peer.serve)
        yield peer
        group.cancel_scope.cancel()


@contextmanager
def nobody() -> Iterator[str]:
    """An address at which nobody listens, and nobody else will: a port that is merely free can be given to
    another process, or to the very connection that is made to it, which then talks to itself."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
async def client() -> AsyncIterator[http.AsyncClient]:
    async with http.client() as client:
        yield client


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF", 0.001)


def get(url: str, **more: object) -> http.Request:
    return http.Request("Test: it", "GET", url, **more)  # type: ignore[arg-type]


def status(line: str, *headers: str, body: bytes = b"") -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {line}", *headers, f"Content-Length: {len(body)}"])
    return head.encode() + b"\r\n\r\n" + body


# -- repetition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(http.TRANSIENT))
async def test_what_may_pass_is_tried_again(client: http.AsyncClient, code: int) -> None:
    async with serving(status(f"{code} No"), status(f"{code} No"), OK) as peer:
        assert (await http.send(client, get(peer.url))).text == "hello"
        assert len(peer.asked) == 3


async def test_it_is_given_up_after_some_attempts(client: http.AsyncClient) -> None:
    async with serving(status("503 No", body=b"closed")) as peer:
        response = await http.send(client, get(peer.url))
        assert (response.status_code, response.text) == (503, "closed")
        assert len(peer.asked) == http.ATTEMPTS


@pytest.mark.parametrize("code", [400, 401, 403, 404, 409, 412, 501])
async def test_what_does_not_pass_is_not(client: http.AsyncClient, code: int) -> None:
    async with serving(status(f"{code} No"), OK) as peer:
        assert (await http.send(client, get(peer.url))).status_code == code
        assert len(peer.asked) == 1


async def test_what_changes_things_is_sent_once(client: http.AsyncClient) -> None:
    async with serving(status("503 No"), OK) as peer:
        request = http.Request("Test: it", "POST", peer.url, content=b"x")
        assert (await http.send(client, request)).status_code == 503
        assert len(peer.asked) == 1
    async with serving(status("429 No"), OK) as peer:  # refused before it was looked at
        request = http.Request("Test: it", "POST", peer.url, content=b"x")
        assert (await http.send(client, request)).status_code == 200
    async with serving(status("503 No"), OK) as peer:
        request = http.Request("Test: it", "POST", peer.url, content=b"x", repeatable=True)
        assert (await http.send(client, request)).status_code == 200


async def test_a_post_that_broke_off_is_not_sent_again(client: http.AsyncClient) -> None:
    async with serving(_reset, OK) as peer:
        with pytest.raises(StorageTransientError, match="cannot be reached"):
            await http.send(client, http.Request("Test: it", "POST", peer.url, content=b"x"))
        assert len(peer.asked) == 1
    async with serving(_reset, OK) as peer:
        assert (await http.send(client, get(peer.url))).text == "hello"


async def _reset(stream: SocketStream) -> None:
    await stream.aclose()


async def test_retry_after_is_waited_for(client: http.AsyncClient) -> None:
    async with serving(status("429 No", "Retry-After: 1"), OK) as peer:
        began = anyio.current_time()
        assert (await http.send(client, get(peer.url))).text == "hello"
        assert anyio.current_time() - began >= 1


@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_no_wait_goes_beyond_the_deadline(client: http.AsyncClient, form: str) -> None:
    value = "3600" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(hours=1))
    async with serving(status("429 No", f"Retry-After: {value}"), OK) as peer:
        response = await http.send(client, get(peer.url))
        assert response.status_code == 429
        assert 3590 < (http.retry_after(response.headers) or 0) <= 3600
        assert len(peer.asked) == 1


@pytest.mark.parametrize(
    "value",
    [
        "",
        "soon",
        "-5",
        "1.5",
        "²",
        "Wed, 99 Foo 2020 99:00:00 GMT",
        "1 Jan 99999999999999999999 00:00:00 GMT",
    ],
)
def test_a_retry_after_without_sense_says_nothing(value: str) -> None:
    assert http.retry_after(http.Headers([(b"retry-after", value.encode("latin-1"))])) is None


async def test_other_rules_of_what_passes(client: http.AsyncClient) -> None:
    async with serving(status("403 No", "X-Left: 0"), OK) as peer:
        rule = get(peer.url, passing=lambda code, headers: 0.0 if headers.get("x-left") == "0" else None)
        assert (await http.send(client, rule)).text == "hello"


# -- deadlines -------------------------------------------------------------------------------------------


async def _hang(stream: SocketStream) -> None:
    await anyio.sleep_forever()


async def _drip(stream: SocketStream) -> None:
    await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        await stream.send(b"x")
        await anyio.sleep(0.01)


@pytest.mark.parametrize("peer_is", [_hang, _drip])
async def test_every_request_has_an_end(
    client: http.AsyncClient, peer_is: Callable[[SocketStream], Awaitable[None]], tmp_path: Path
) -> None:
    async with serving(peer_is) as peer:
        with pytest.raises(StorageTransientError, match=r"it did not answer in time; try again later$"):
            await http.send(client, get(peer.url, deadline=0.3))
        with pytest.raises(StorageTransientError, match=r"it (took longer|did not answer)"):
            await http.download(client, get(peer.url, deadline=0.3), tmp_path / "file", deadline=0.4)
        assert not list(tmp_path.iterdir())


async def test_a_server_that_is_not_there(client: http.AsyncClient) -> None:
    with nobody() as gone, pytest.raises(StorageTransientError) as refused:
        await http.send(client, get(f"http://{gone}/path?token={SECRET}"))
    assert str(refused.value).startswith(f"Test: it: http://{gone}/path cannot be reached: ")
    assert SECRET not in str(refused.value)


# -- bodies ----------------------------------------------------------------------------------------------


async def test_a_download_is_a_file_and_its_digest(client: http.AsyncClient, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    seen: list[int] = []
    async with serving(status("200 OK", "X-Id: 7", body=data)) as peer:
        got = await http.download(client, get(peer.url), tmp_path / "file", advance=seen.append)
    assert (tmp_path / "file").read_bytes() == data
    assert (got.size, got.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (got.headers["x-id"], sum(seen)) == ("7", len(data))


async def test_a_body_that_breaks_off_is_asked_for_again(client: http.AsyncClient, tmp_path: Path) -> None:
    async def half(stream: SocketStream) -> None:
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel")

    seen: list[int] = []
    async with serving(half, OK) as peer:
        got = await http.download(client, get(peer.url), tmp_path / "file", advance=seen.append)
    assert (tmp_path / "file").read_bytes() == b"hello"
    assert got.size == sum(seen) == 5
    async with serving(half) as peer:
        with pytest.raises(StorageTransientError, match="cannot be reached: peer closed connection"):
            await http.download(client, get(peer.url), tmp_path / "other", advance=seen.append)
        with pytest.raises(StorageTransientError):
            await http.send(client, get(peer.url))
        assert len(peer.asked) == 2 * http.ATTEMPTS
    assert sum(seen) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


async def test_no_more_is_taken_than_was_agreed(client: http.AsyncClient, tmp_path: Path) -> None:
    async with serving(OK) as peer:
        assert (await http.send(client, get(peer.url, limit=5))).text == "hello"
        with pytest.raises(BackendError, match="sends more than 4 bytes; that is not taken"):
            await http.send(client, get(peer.url, limit=4))
        with pytest.raises(BackendError, match="sends more than 4 bytes"):
            await http.download(client, get(peer.url, limit=4), tmp_path / "file")
    assert not list(tmp_path.iterdir())


async def test_what_a_failed_download_says_is_not_a_file(client: http.AsyncClient, tmp_path: Path) -> None:
    async with serving(status("404 No", body=b"no such thing")) as peer:
        got = await http.download(client, get(peer.url), tmp_path / "file")
    assert (got.status, got.body, got.size) == (404, b"no such thing", 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_compressed_body_is_unpacked(client: http.AsyncClient, coding: str) -> None:
    data = b"text " * 200_000
    packed = gzip.compress(data) if coding == "gzip" else zlib.compress(data)
    async with serving(status("200 OK", f"Content-Encoding: {coding}", body=packed)) as peer:
        assert (await http.send(client, get(peer.url))).content == data
        assert b"accept-encoding: gzip, deflate\r\n" in peer.asked[0].lower()


@pytest.mark.parametrize("size", [1, 7, 1 << 18, 300_000])
async def test_a_compressed_body_of_several_members(
    client: http.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """RFC 1952, section 2.2: they follow one another, and are one content."""
    texts = [b"first half\n", b"", os.urandom(size), b"x" * (1 << 18), b"", b"second half\n"]
    packed = b"".join(map(gzip.compress, texts))
    for chunk in (1 << 18, 100):
        monkeypatch.setattr(http, "CHUNK", chunk)
        async with serving(status("200 OK", "Content-Encoding: gzip", body=packed)) as peer:
            assert (await http.send(client, get(peer.url))).content == b"".join(texts)
            got = await http.download(client, get(peer.url), tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == b"".join(texts)
        assert got.size == sum(map(len, texts))


async def test_members_with_nothing_in_them(client: http.AsyncClient) -> None:
    """They cost who sends them more than us, and let others do their work."""
    packed = gzip.compress(b"") * 30_000
    turns = 0

    async def work() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async with (
        serving(status("200 OK", "Content-Encoding: gzip", body=packed)) as peer,
        anyio.create_task_group() as group,
    ):
        group.start_soon(work)
        assert (await http.send(client, get(peer.url))).content == b""
        assert turns >= 30_000
        with pytest.raises(BackendError, match="sends more than 100000 bytes"):
            await http.send(client, get(peer.url, limit=100_000))
        group.cancel_scope.cancel()


async def test_a_decompression_bomb_takes_no_memory(client: http.AsyncClient, tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(256 << 20), 9)
    assert len(bomb) < 300_000
    async with serving(status("200 OK", "Content-Encoding: gzip", body=bomb)) as peer:
        tracemalloc.start()
        try:
            with pytest.raises(BackendError, match="sends more than 1048576 bytes"):
                await http.send(client, get(peer.url, limit=1 << 20))
            with pytest.raises(BackendError, match="sends more than 1048576 bytes"):
                await http.download(client, get(peer.url, limit=1 << 20), tmp_path / "file")
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("coding", "body", "message"),
    [
        ("gzip", gzip.compress(b"x" * 1000)[:-9], "its body ended too early"),
        ("gzip", b"this is not gzip", "cannot be decoded"),
        ("gzip", gzip.compress(b"x" * 1000) + gzip.compress(b"y" * 1000)[:-9], "its body ended too early"),
        ("gzip", gzip.compress(b"x" * 1000) + b"\x1f", "its body ended too early"),
        ("gzip", gzip.compress(b"x" * 1000) + b"junk", "cannot be decoded"),
        ("gzip", gzip.compress(b"x" * 1000) + bytes(512), "cannot be decoded"),
        ("deflate", zlib.compress(b"x" * 1000) + b"junk", "more follows after its end"),
        ("deflate", zlib.compress(b"x") + zlib.compress(b"y"), "more follows after its end"),
        ("br", b"whatever", "encoded as 'br', which was not asked for"),
    ],
)
async def test_a_broken_encoding_is_no_content(
    client: http.AsyncClient, tmp_path: Path, coding: str, body: bytes, message: str
) -> None:
    async with serving(status("200 OK", f"Content-Encoding: {coding}", body=body)) as peer:
        with pytest.raises(StorageTransientError, match=message):
            await http.send(client, get(peer.url))
        with pytest.raises(StorageTransientError, match=message):
            await http.download(client, get(peer.url), tmp_path / "file")
    assert not list(tmp_path.iterdir())


async def test_a_file_is_streamed_as_a_body(client: http.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data" * 100_000)
    async with serving(status("503 No"), OK) as peer:
        request = http.Request("Test: it", "PUT", peer.url, content=tmp_path / "file")
        assert (await http.send(client, request)).status_code == 200
        for asked in peer.asked:
            assert b"content-length: 400000\r\n" in asked.lower()
            assert asked.endswith(b"\r\n\r\n" + b"data" * 100_000)
    assert len(peer.asked) == 2


async def test_a_form(client: http.AsyncClient) -> None:
    body, kind = http.multipart({"message": "add a 'flöw'"}, {"flows/a.py": b"x = 1\r\n"})
    assert kind.startswith("multipart/form-data; boundary=")
    assert b"name=\"message\"\r\n\r\nadd a 'fl\xc3\xb6w'\r\n" in body
    assert b'name="flows/a.py"; filename="a.py"\r\n' in body
    assert b"\r\n\r\nx = 1\r\n\r\n--" in body


# -- redirects -------------------------------------------------------------------------------------------


async def test_a_redirect_is_followed_where_asked_for(client: http.AsyncClient) -> None:
    async with serving(status("302 Found", "Location: /there"), OK) as peer:
        assert (await http.send(client, get(peer.url))).status_code == 302
    async with serving(status("302 Found", "Location: /there?a=1"), OK) as peer:
        request = get(f"{peer.url}/here", follow=True, headers={"Authorization": SECRET}, params={"b": "2"})
        assert (await http.send(client, request)).text == "hello"
        assert peer.asked[1].startswith(b"GET /there?a=1 HTTP/1.1\r\n")
        assert SECRET.encode() in peer.asked[1]


@pytest.mark.parametrize("header", ["Authorization", "PRIVATE-TOKEN", "Cookie", "X-Key"])
async def test_credentials_go_to_no_other_host(client: http.AsyncClient, header: str) -> None:
    async with serving(OK) as other, serving(status("307 Go", f"Location: {other.url}/x")) as peer:
        headers = {header: SECRET, "Accept": "text/plain"}
        request = get(
            peer.url,
            follow=True,
            headers=headers,
            private=("authorization", "private-token", "cookie", "x-key"),
        )
        assert (await http.send(client, request)).text == "hello"
        assert SECRET.encode() in peer.asked[0]
        assert SECRET.encode() not in other.asked[0]
        assert b"accept: text/plain" in other.asked[0].lower()


async def test_nor_do_they_come_back(client: http.AsyncClient) -> None:
    """From another host, a redirect back is that host's doing."""
    async with serving(status("302 Go", "Location: /a"), OK) as peer:
        back = status("302 Go", f"Location: {peer.url}/back")
        async with serving(back) as other:
            peer.answer = lambda n: status("302 Go", f"Location: {other.url}/x") if n == 1 else OK
            request = get(peer.url, follow=True, headers={"Authorization": SECRET})
            assert (await http.send(client, request)).text == "hello"
            assert SECRET.encode() not in other.asked[0] + peer.asked[1]


async def test_a_body_goes_to_no_other_host(client: http.AsyncClient) -> None:
    async with serving(OK) as other, serving(status("307 Go", f"Location: {other.url}/x")) as peer:
        request = http.Request("Test: it", "PUT", peer.url, content=b"x", follow=True)
        with pytest.raises(
            BackendError, match=r"redirects to another host, 127\.0\.0\.1, and what is sent is not"
        ):
            await http.send(client, request)
        assert not other.asked


@pytest.mark.parametrize(
    ("code", "method", "then"), [(303, "PUT", b"GET"), (302, "POST", b"GET"), (307, "PUT", b"PUT")]
)
async def test_methods_of_redirects(client: http.AsyncClient, code: int, method: str, then: bytes) -> None:
    async with serving(status(f"{code} Go", "Location: /x"), OK) as peer:
        headers = {"Content-Type": "text/plain"}
        request = http.Request("Test: it", method, peer.url, content=b"data", follow=True, headers=headers)
        await http.send(client, request)
        assert peer.asked[1].startswith(then + b" /x")
        assert (b"text/plain" in peer.asked[1]) == peer.asked[1].endswith(b"data") == (then != b"GET")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("file:///etc/passwd", "redirects to what is no address, which is not safe"),
        ("ftp://example.org/x", "redirects to ftp://example.org, which is not safe"),
        ("http://[::1", "Invalid URL in location header"),
        ("file:", "redirects to what is no address"),
        ("/again", "redirects without an end"),
    ],
)
async def test_redirects_astray(client: http.AsyncClient, location: str, message: str) -> None:
    async with serving(status("302 Go", f"Location: {location}")) as peer:
        with pytest.raises(BackendError, match=message):
            await http.send(client, get(peer.url, follow=True))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def _server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


async def test_tls_is_not_left(authority: trustme.CA) -> None:
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    async with http.client(verify=trusted) as client, serving(OK) as plain:
        away = status("302 Go", f"Location: {plain.url}/x?token={SECRET}")
        async with serving(away, tls=_server_tls(authority)) as peer:
            with pytest.raises(BackendError, match="which is not safe") as refused:
                await http.send(client, get(peer.url, follow=True))
            assert SECRET not in str(refused.value)
        assert not plain.asked


async def test_a_certificate_that_nobody_vouches_for(client: http.AsyncClient, authority: trustme.CA) -> None:
    async with serving(OK, tls=_server_tls(authority)) as peer:
        with pytest.raises(
            BackendError, match=r"certificate that is not trusted \(.*\); name its"
        ) as refused:
            await http.send(client, get(peer.url))
        assert not refused.value.retryable


# -- discretion ------------------------------------------------------------------------------------------


async def test_no_cookie_is_kept(client: http.AsyncClient) -> None:
    """One client serves those with different tokens."""
    async with serving(status("200 OK", f"Set-Cookie: session={SECRET}; Path=/", body=b"x")) as peer:
        for _ in range(2):
            await http.send(client, get(peer.url))
        assert b"ookie" not in peer.asked[1]


@pytest.mark.parametrize(
    "value", [f"Bearer {SECRET}\n", f"{SECRET}\r\nX-Evil: 1", f"{SECRET}\0", f"{SECRET}\x7f"]
)
async def test_a_header_cannot_begin_another(client: http.AsyncClient, value: str) -> None:
    async with serving(OK) as peer:
        with pytest.raises(BackendError, match="header Authorization would hold a line break") as refused:
            await http.send(client, get(peer.url, headers={"Authorization": value}))
        with pytest.raises(BackendError, match="is no name of a header"):
            await http.send(client, get(peer.url, headers={"X: y\r\nX-Evil": "1"}))
        assert not peer.asked
    assert SECRET not in str(refused.value)


async def test_a_header_may_hold_any_text(client: http.AsyncClient) -> None:
    async with serving(OK) as peer:
        await http.send(client, get(peer.url, headers={"X-Name": "Zoë\t🐍"}))
        assert "x-name: Zoë\t🐍\r\n".encode() in peer.asked[0]
        assert f"user-agent: flowagent/{flowagent.__version__}\r\n".encode() in peer.asked[0].lower()


@pytest.mark.parametrize(
    "url", ["", "no address", "ftp://host/x", "file:///etc/passwd", "http://", "http://[::1", "//host/x"]
)
async def test_an_address_that_is_none(client: http.AsyncClient, url: str) -> None:
    with pytest.raises(
        BackendError, match=r"^Test: it: its address is no address that HTTP can reach"
    ) as refused:
        await http.send(client, get(url))
    assert not refused.value.retryable


async def test_what_cannot_be_sent_is_said(client: http.AsyncClient) -> None:
    async with serving(OK) as peer:
        with pytest.raises(BackendError, match="header X-Name would hold what is no text"):
            await http.send(client, get(peer.url, headers={"X-Name": "\ud800"}))
        for url, params in (
            (f"{peer.url}/\ud800", {}),
            (peer.url, {"page": "x" * 100_000}),
            (peer.url, {"page": "\ud800"}),
            ("http://\ud800/", {}),
        ):
            with pytest.raises(BackendError, match="is no address that HTTP can reach"):
                await http.send(client, get(url, params=params))
        assert not peer.asked


async def test_errors_show_what_they_were_told_to(client: http.AsyncClient) -> None:
    with nobody() as gone:
        for where in ("", "https://hooks.example/${TOKEN}"):
            with pytest.raises(StorageTransientError) as refused:
                url = f"http://user:{SECRET}@{gone}/x?sig={SECRET}#{SECRET}"
                await http.send(client, get(url, where=where))
            assert SECRET not in str(refused.value)
            assert (where or "/x cannot be reached") in str(refused.value)
            assert "\n" not in str(refused.value)


async def test_what_was_sent_is_not_shown_when_it_comes_back(client: http.AsyncClient) -> None:
    """Errors of the parser quote what it could not read."""

    async def echo(stream: SocketStream) -> None:
        await stream.send(peer.asked[-1])

    async def reflect(stream: SocketStream) -> None:
        await stream.send(b"HTTP/1.1 200 OK\r\nno header: \0" + SECRET.encode() + b"\r\n\r\n")

    for answer in (echo, reflect):
        async with serving(answer) as peer:
            with pytest.raises(StorageTransientError, match=r"illegal (status|header) line") as refused:
                headers = {"Authorization": SECRET}
                await http.send(client, get(f"{peer.url}/x?sig={SECRET}", headers=headers, deadline=5))
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:pw@host:8443/a/b?x=1#y", "https://host:8443/a/b"),
        ("https://host:443", "https://host/"),
        ("http://[::1]:8080/x?y", "http://[::1]:8080/x"),
    ],
)
def test_how_addresses_are_shown(url: str, expected: str) -> None:
    assert http.shown(url) == expected


async def test_an_answer_that_is_not_http_is_no_danger(client: http.AsyncClient) -> None:
    async def nonsense(stream: SocketStream) -> None:
        await stream.send(b"\x1b[31m nonsense \n" * 1000 + b"\r\n\r\n")

    async with serving(nonsense) as peer:
        with pytest.raises(StorageTransientError) as refused:
            await http.send(client, get(peer.url))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


async def test_a_slow_host_keeps_no_other_waiting(client: http.AsyncClient, tmp_path: Path) -> None:
    async with serving(_drip) as slow, serving(OK) as other, anyio.create_task_group() as group:
        for number in range(http.MOST_CONNECTIONS + 5):
            group.start_soon(http.download, client, get(slow.url), tmp_path / str(number))
        while len(slow.asked) < http.MOST_CONNECTIONS:
            await anyio.sleep(0.01)
        began = anyio.current_time()
        assert (await http.send(client, get(other.url))).text == "hello"
        assert anyio.current_time() - began < 1
        assert len(slow.asked) == http.MOST_CONNECTIONS
        with pytest.raises(
            StorageTransientError, match=rf"{slow.url}/ cannot be reached: 20 other requests to it have not"
        ):
            await http.send(client, get(slow.url, deadline=0.2))
        group.cancel_scope.cancel()
    assert not http._PLACES[client]


async def test_places_are_given_back(client: http.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MOST_CONNECTIONS", 1)
    redirect = status("302 Go", "Location: /there")
    async with serving(_reset, status("503 No"), redirect, OK, _reset) as peer:
        assert (await http.send(client, get(peer.url, follow=True))).text == "hello"
        with pytest.raises(StorageTransientError, match="cannot be reached"):
            await http.send(client, get(peer.url))
    async with serving(_hang) as peer:
        for _ in range(3):
            with pytest.raises(StorageTransientError, match="it did not answer in time"):
                await http.send(client, get(peer.url, deadline=0.05))
    with nobody() as gone:
        for _ in range(3):
            with pytest.raises(StorageTransientError, match="cannot be reached"):
                await http.send(client, get(f"http://{gone}/"))
    assert not http._PLACES[client]


async def test_a_download_has_a_pace(
    client: http.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "PACE", 0.2)
    async with serving(_drip) as peer:
        began = anyio.current_time()
        with pytest.raises(StorageTransientError) as refused:
            await http.download(client, get(f"{peer.url}/x?key={SECRET}"), tmp_path / "file")
        assert str(refused.value) == (
            f"Test: it: {peer.url}/x is too slow: less than 1024 bytes/s for 0.2 s; try again later"
        )
        assert anyio.current_time() - began < 2
        assert len(peer.asked) == 1
        address = peer.url.replace("127.0.0.1", "localhost")
        async with serving(status("302 Go", f"Location: {address}/raw?key={SECRET}")) as first:
            with pytest.raises(StorageTransientError) as refused:
                await http.download(client, get(f"{first.url}/x", follow=True), tmp_path / "file")
            assert f"{first.url}/x, which sends us to localhost, is too slow" in str(refused.value)
            assert SECRET not in str(refused.value)
        assert not list(tmp_path.iterdir())

    async def steady(stream: SocketStream) -> None:
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6400\r\n\r\n")
        for _ in range(64):
            await stream.send(b"x" * 100)
            await anyio.sleep(0.01)

    async with serving(steady) as peer:
        got = await http.download(client, get(peer.url), tmp_path / "file")
        assert got.size == 6400


async def test_more_requests_than_connections(client: http.AsyncClient) -> None:
    async def slow(stream: SocketStream) -> None:
        await anyio.sleep(0.02)
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")

    async with serving(slow) as peer, anyio.create_task_group() as group:
        for _ in range(5 * http.MOST_CONNECTIONS):
            group.start_soon(http.send, client, get(peer.url))
    assert len(peer.asked) == 5 * http.MOST_CONNECTIONS


@pytest.mark.parametrize(
    ("url", "is_so"),
    [
        ("https://git.example/x", True),
        ("http://localhost:8080/x", True),
        ("http://127.0.0.9/x", True),
        ("http://[::1]:1/x", True),
        ("http://git.example/x", False),
        ("http://127.0.0.1.example/x", False),
        ("http://localhost@git.example/x", False),
        ("http://10.0.0.1/x", False),
        ("http://0.0.0.0/x", False),
    ],
)
def test_what_nobody_on_the_way_can_read(url: str, is_so: bool) -> None:
    assert http.confidential(url) is is_so
