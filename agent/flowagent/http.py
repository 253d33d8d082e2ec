"""HTTP, as every part of flowagent speaks it: patient, bounded, and discreet.

This is the only module that imports httpx. A request has a deadline in all, is repeated where that is safe
and can help, reads no more than it was told to, carries its credentials to no other host, and shows neither
query strings nor credentials in its errors. Nothing is remembered from one request for the next: no cookies.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import random
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import aiofiles
import anyio
import httpcore  # httpx' own transport: what a connection that was taken over raises
import httpx
from aiofiles.threadpool.binary import AsyncBufferedIOBase
from anyio.lowlevel import checkpoint
from httpx import AsyncClient, Headers, Response

import flowagent
from flowagent.errors import BackendError, StorageTransientError, one_line

__all__ = [
    "AsyncClient",
    "Counted",
    "Downloaded",
    "Headers",
    "Request",
    "Response",
    "TooLargeError",
    "client",
    "confidential",
    "download",
    "multipart",
    "passing",
    "retry_after",
    "send",
    "shown",
    "timeout",
    "transport_errors",
    "written",
]

T = TypeVar("T")

MOST_CONNECTIONS = 20
"""How many requests one origin has at the same time; the rest waits, and nothing else does for it."""
SLOWEST, PACE = 1024, 60.0
"""Bytes per second that a download comes at, at least, on average over so many seconds of waiting for it."""
PATIENCE = 60.0
TRANSFER = 3600.0
ATTEMPTS = 4
BACKOFF = 0.2
BODY_LIMIT = 16 << 20
CHUNK = 1 << 18
REDIRECTS = 5
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
"""Status codes after which the same request, later, can succeed (RFC 9110, RFC 6585)."""


class TooLargeError(BackendError):
    """More bytes came than were to be taken."""


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # takes 20 ms and a megabyte: one for all


def client(
    *,
    base_url: str = "",
    timeout: float = 30.0,
    socket: str | None = None,
    **options: Any,
) -> AsyncClient:
    """A client with kept-alive connections; it follows the environment's proxies. ``timeout``: seconds that
    any single read, write or connect may take. ``socket``: the path of the unix socket that it goes to."""
    # not limited here: in one queue for all, a slow host would keep the others waiting
    limits = httpx.Limits(max_connections=None, keepalive_expiry=60.0)
    if socket is not None:
        options["transport"] = httpx.AsyncHTTPTransport(uds=socket, limits=limits)
    return AsyncClient(
        base_url=base_url,
        verify=False if socket is not None else options.pop("verify", None) or _tls(),
        timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
        limits=limits,
        headers={
            "User-Agent": f"flowagent/{flowagent.__version__}",
            "Accept-Encoding": "gzip, deflate",  # what is decoded here, within bounds
            **options.pop("headers", {}),
        },
        # clients are shared by those with different tokens: a session must not be
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        **options,
    )


def retry_after(headers: Headers) -> float | None:
    """Seconds that the server asks to wait (RFC 9110, Retry-After: seconds or a date)."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, LookupError, OverflowError):
        return None


def passing(status: int, headers: Headers) -> float | None:
    """Seconds after which the same request may succeed, 0 if nobody says; None: waiting does not help."""
    return (retry_after(headers) or 0.0) if status in TRANSIENT else None


def timeout(seconds: float, *, read: float | None) -> httpx.Timeout:
    """Seconds for each step of a request; ``read``: between two pieces of the answer, None: any."""
    return httpx.Timeout(seconds, read=read)


@contextmanager
def transport_errors(error: Callable[[str], Exception]) -> Iterator[None]:
    """Raise what ``error`` makes of the words for a connection that fails, breaks off or takes too long."""
    try:
        yield
    except TimeoutError:
        raise error("it did not answer in time") from None
    except (httpx.TransportError, httpcore.NetworkError, httpcore.TimeoutException) as failure:
        raise error(_in_words(failure)) from failure
    except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as failure:
        raise error(getattr(failure, "strerror", None) or type(failure).__name__) from failure


@dataclass(frozen=True)
class Request:
    """A request, and whose it is.

    ``what`` begins every error: ``"GitHub: acme/flows"``; ``where`` is the address as errors show it, by
    default the URL's without its query. ``content``: bytes, or a file that is streamed. ``private`` names
    the headers that carry credentials: a redirect to another origin goes without them. ``repeatable``:
    sending it twice does no harm; by default so for all methods but POST and PATCH. ``passing`` judges
    responses as :func:`passing` does. ``deadline``: seconds for all attempts together.
    """

    what: str
    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] | None = None
    content: bytes | Path | None = None
    private: Collection[str] = ("Authorization", "Private-Token", "Job-Token", "Cookie")
    repeatable: bool | None = None
    follow: bool = False
    deadline: float = PATIENCE
    attempts: int = ATTEMPTS
    limit: int = BODY_LIMIT
    where: str = ""
    passing: Callable[[int, Headers], float | None] = passing
    advance: Callable[[int], None] | None = None
    """Is told of each number of bytes of the content that are sent."""

    @property
    def safe(self) -> bool:
        return self.method not in ("POST", "PATCH") if self.repeatable is None else self.repeatable


def shown(url: httpx.URL | str) -> str:
    """An URL as it may stand in an error or log: without user, password, query and fragment."""
    url = httpx.URL(url)
    host = f"[{url.host}]" if ":" in url.host else url.host
    port = f":{url.port}" if url.port else ""
    return f"{url.scheme}://{host}{port}{url.path}"


def confidential(url: httpx.URL | str) -> bool:
    """Whether nobody on the way can read what goes there: by TLS, or not beyond this machine."""
    try:
        url = httpx.URL(url)
    except httpx.InvalidURL:
        return True  # nothing goes there
    try:
        here = url.host == "localhost" or ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        here = False
    return url.scheme == "https" or here


def multipart(fields: Mapping[str, str], files: Mapping[str, bytes]) -> tuple[bytes, str]:
    """A form with files as ``(body, Content-Type)`` (RFC 7578)."""
    parts: list[Any] = [(name, (None, value.encode())) for name, value in fields.items()]
    parts += [(name, (name.rpartition("/")[2], value)) for name, value in files.items()]
    made = httpx.Request("POST", "http://localhost/", files=parts)
    return made.read(), made.headers["content-type"]


async def send(using: AsyncClient, request: Request) -> Response:
    """The response with its body, whatever its status; a transient one only if repeating did not help.

    :raises StorageTransientError: no answer in time, or none at all.
    :raises TooLargeError: more than ``limit`` bytes came.
    :raises BackendError: a redirect leads astray."""

    async def read(response: Response) -> Response:
        response._content = await _body(request, response, request.limit)  # as aread, which knows no limit
        return response

    sent = _Sent(request.advance)
    with anyio.move_on_after(request.deadline):
        return await _exchange(using, request, sent, read)
    raise _unreached(using, request, sent.late())


@dataclass(frozen=True)
class Downloaded:
    """What came into a file. With another ``status`` than 200 nothing was written, and ``body`` says why."""

    status: int
    headers: Headers
    size: int = 0
    sha256: str = ""
    body: bytes = b""


async def download(
    using: AsyncClient,
    request: Request,
    file: Path,
    *,
    advance: Callable[[int], None] | None = None,
    deadline: float = TRANSFER,
) -> Downloaded:
    """Stream the body of a 200 into a file, with the memory of one chunk; ``advance(bytes)`` is told of it.

    The request's own deadline is for the head of the response, ``deadline`` for all; of what is not
    finished, no file stays.

    :raises StorageTransientError: it broke off before its end, came too slowly, or took too long.
    :raises TooLargeError: more than ``limit`` bytes came."""

    async def read(response: Response) -> Downloaded:
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Paced(response.stream, lambda: _too_slow(using, request, response))
        if response.status_code != 200:
            body = await _body(request, response, BODY_LIMIT)
            return Downloaded(response.status_code, response.headers, body=body)
        digest, size, counted = hashlib.sha256(), 0, Counted(advance)
        try:
            async with written(file) as target:
                async for chunk in _decoded(request, response, request.limit):
                    size += len(chunk)
                    if size > request.limit:
                        raise _too_much(using, request)
                    digest.update(chunk)
                    await target.write(chunk)
                    counted(len(chunk))
        except BaseException:
            counted.take_back()
            with suppress(OSError):
                os.unlink(file)
            raise
        return Downloaded(200, response.headers, size, digest.hexdigest())

    with anyio.move_on_after(deadline):
        return await _exchange(using, request, _Sent(request.advance), read)
    raise _unreached(using, request, f"it took longer than {deadline:g} s")


@asynccontextmanager
async def written(file: Path) -> AsyncIterator[AsyncBufferedIOBase]:
    """A file to write to from the event loop. It is closed at the end, also when that is a cancellation."""
    with anyio.CancelScope(shield=True):
        target = await aiofiles.open(file, "wb")
    try:
        yield target
    finally:
        with anyio.CancelScope(shield=True):
            await target.close()


# -- attempts ------------------------------------------------------------------------------------------


async def _exchange(
    using: AsyncClient, request: Request, sent: _Sent, read: Callable[[Response], Awaitable[T]]
) -> T:
    """What ``read`` makes of the first response that no repetition can better."""
    end = anyio.current_time() + request.deadline
    attempt = 0
    while True:
        attempt += 1
        wait = BACKOFF * 4 ** (attempt - 1) * random.uniform(0.75, 1.25)  # noqa: S311 - not for secrecy
        try:
            with anyio.fail_after(max(0.0, end - anyio.current_time())):
                response = await _follow(using, request, sent)
            try:
                after = request.passing(response.status_code, response.headers)
                wait = max(wait, after or 0.0)
                # 429: it was not even looked at
                again = after is not None and (request.safe or response.status_code == 429)
                if not (again and attempt < request.attempts and anyio.current_time() + wait < end):
                    return await read(response)
            finally:
                with anyio.CancelScope(shield=True):
                    await _close(response)
        except TimeoutError:
            raise _unreached(using, request, sent.late()) from None
        except httpx.DecodingError as error:
            raise _unreached(using, request, f"what it sent cannot be decoded ({error})") from error
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError):
            raise _unusable(request) from None  # the message may show a header
        except httpx.TransportError as error:
            if reason := _distrust(error):
                raise BackendError(
                    f"{request.what}: {_where(using, request)} has a certificate that is not trusted "
                    f"({reason}); name its authority's file in SSL_CERT_FILE"
                ) from error
            unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            more = attempt < request.attempts and anyio.current_time() + wait < end
            if not (more and (request.safe or unsent)):
                raise _unreached(using, request, _in_words(error)) from error
        await anyio.sleep(wait)


async def _follow(using: AsyncClient, request: Request, progress: _Sent) -> Response:
    try:
        url = using.base_url.join(request.url) if str(using.base_url) else httpx.URL(request.url)
    except (httpx.InvalidURL, UnicodeEncodeError):
        raise _unusable(request) from None
    if url.scheme not in ("http", "https") or not url.host:
        raise _unusable(request)
    method, content, params, origin = request.method, request.content, request.params, url
    headers = _headers(request)
    if content is not None:
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        headers["content-length"] = str(size).encode()
    for _ in range(REDIRECTS):
        encoded = [(name.encode(), value) for name, value in headers.items()]
        progress.take_back()
        body = None if content is None else _Streamed(content, progress)
        try:
            sent = using.build_request(method, url, headers=encoded, params=params, content=body)
        except (httpx.InvalidURL, UnicodeEncodeError):  # by its params
            raise _unusable(request) from None
        response = await _begin(using, sent, progress)
        if not (request.follow and response.has_redirect_location):
            return response
        await _close(response)
        target = _target(using, request, sent.url, response)
        if response.status_code == 303 or (response.status_code in (301, 302) and method == "POST"):
            method, content = ("HEAD" if method == "HEAD" else "GET"), None
            headers = {name: value for name, value in headers.items() if not name.startswith("content-")}
        if (target.scheme, target.host, target.port) != (origin.scheme, origin.host, origin.port):
            if content is not None:
                raise BackendError(
                    f"{request.what}: {_where(using, request)} redirects to another host, {target.host}, "
                    "and what is sent is not for it; give that address if it is right"
                )
            private = {name.lower() for name in request.private}
            headers = {name: value for name, value in headers.items() if name not in private}
        url, params = target, None
    raise BackendError(
        f"{request.what}: {_where(using, request)} redirects without an end; check the address"
    )


_PLACES: WeakKeyDictionary[AsyncClient, dict[tuple[str, str, int | None], _Place]] = WeakKeyDictionary()
_LEAVE = "flowagent.leave"


@dataclass
class _Place:
    """Where those wait who want something of one origin."""

    free: anyio.Semaphore = field(default_factory=lambda: anyio.Semaphore(MOST_CONNECTIONS))
    users: int = 0


async def _begin(using: AsyncClient, sent: httpx.Request, progress: _Sent) -> Response:
    """The head of a response, when it is its turn. It has to be closed by :func:`_close`."""
    places = _PLACES.setdefault(using, {})
    origin = (sent.url.scheme, sent.url.host, sent.url.port)
    place = places.setdefault(origin, _Place())
    place.users += 1

    def leave() -> None:
        place.users -= 1
        if not place.users:
            del places[origin]

    def finish() -> None:
        place.free.release()
        leave()

    progress.queued = True
    try:
        await place.free.acquire()
    except BaseException:
        leave()
        raise
    progress.queued = False
    try:
        response = await using.send(sent, stream=True, follow_redirects=False)
    except BaseException:
        finish()
        raise
    response.extensions[_LEAVE] = finish
    return response


async def _close(response: Response) -> None:
    """End a response, and let the next one begin."""
    try:
        await response.aclose()
    finally:
        response.extensions.pop(_LEAVE)()


def _target(using: AsyncClient, request: Request, url: httpx.URL, response: Response) -> httpx.URL:
    """Where a response redirects to. :raises BackendError: nowhere that is safe to go."""
    try:
        target = url.join(response.headers["location"])
    except (httpx.InvalidURL, ValueError):
        target = None
    if target is not None and target.scheme in ("https", url.scheme) and target.host:
        return target
    to = f"{target.scheme}://{target.host}" if target is not None and target.host else "what is no address"
    raise BackendError(
        f"{request.what}: {_where(using, request)} redirects to {to}, which is not safe; check the address"
    )


def _headers(request: Request) -> dict[str, bytes]:
    """By lower-case name, encoded.

    :raises BackendError: a value would end early, and begin another header (RFC 9110, field values)."""
    encoded: dict[str, bytes] = {}
    for name, value in request.headers.items():
        if any((ord(letter) < 32 and letter != "\t") or letter == "\x7f" for letter in value):
            raise BackendError(
                f"{request.what}: header {name} would hold a line break or another control character; "
                "remove it from the value, or from the secret in it"
            )
        if not name.isascii() or not all(letter.isalnum() or letter in "!#$%&'*+-.^_`|~" for letter in name):
            raise BackendError(f"{request.what}: {name!r} is no name of a header; correct it")
        try:
            encoded[name.lower()] = value.encode(errors="surrogateescape")
        except UnicodeEncodeError:
            raise BackendError(
                f"{request.what}: header {name} would hold what is no text; correct it"
            ) from None
    return encoded


class _Streamed(httpx.AsyncByteStream):
    """A body, sent with the memory of one chunk."""

    def __init__(self, content: bytes | Path, progress: _Sent) -> None:
        self._content = content
        self._progress = progress

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if isinstance(self._content, bytes):
            for start in range(0, len(self._content), CHUNK):
                chunk = self._content[start : start + CHUNK]
                yield chunk
                self._progress(len(chunk))
            self._content = b""  # a response and its request refer to each other, and are not freed at once
            return
        async with aiofiles.open(self._content, "rb") as file:
            while chunk := await file.read(CHUNK):
                yield chunk
                self._progress(len(chunk))


class Counted:
    """Tells of progress, and can take it back: what is sent or fetched again counts once."""

    def __init__(self, advance: Callable[[int], None] | None) -> None:
        self._advance = advance or (lambda amount: None)
        self._amount = 0

    def __call__(self, amount: int) -> None:
        self._amount += amount
        self._advance(amount)

    def take_back(self) -> None:
        if self._amount:
            self(-self._amount)


class _Sent(Counted):
    """How much of a body was sent."""

    queued = False
    """Whether it waits for others to the same origin, and has not begun."""

    def late(self) -> str:
        """Why there is no answer in time."""
        if self.queued:
            return f"{MOST_CONNECTIONS} other requests to it have not ended in time"
        return "it did not answer in time"


# -- bodies --------------------------------------------------------------------------------------------


class _Paced(httpx.AsyncByteStream):
    """What comes of a body, as long as it comes fast enough."""

    def __init__(self, stream: httpx.AsyncByteStream, too_slow: Callable[[], Exception]) -> None:
        self._stream = stream
        self._too_slow = too_slow

    async def __aiter__(self) -> AsyncIterator[bytes]:
        amount, waited, began = 0, 0.0, anyio.current_time()
        async for piece in self._stream:
            amount += len(piece)
            waited += anyio.current_time() - began  # and not what the reader does with it
            if waited >= PACE:
                if amount < SLOWEST * waited:
                    raise self._too_slow()
                amount, waited = 0, 0.0
            yield piece
            began = anyio.current_time()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _body(request: Request, response: Response, limit: int) -> bytes:
    body = bytearray()
    async for chunk in _decoded(request, response, limit):
        body += chunk
        if len(body) > limit:
            raise _too_much(None, request)
    return bytes(body)


async def _decoded(request: Request, response: Response, limit: int) -> AsyncIterator[bytes]:
    """The body in pieces of at most a chunk, however much it unpacks to, and whole, or an error. Who reads
    them counts them; ``limit`` is for what unpacks to less than it takes to send."""
    coding = response.headers.get("content-encoding", "").strip().lower()
    if coding in ("", "identity"):
        async for chunk in response.aiter_raw(CHUNK):
            yield chunk
        return
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise httpx.DecodingError(f"encoded as {coding[:40]!r}, which was not asked for")
    if request.method == "HEAD" or response.status_code in (204, 304):
        return
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either format, by its header
    came = 0
    try:
        async for chunk in response.aiter_raw(CHUNK):
            came += len(chunk)
            if came > limit + CHUNK:
                raise _too_much(None, request)
            full = False
            while chunk or full:
                if decoder.eof:  # there is more: another member (RFC 1952, section 2.2), or what has no place
                    if coding == "deflate":
                        raise httpx.DecodingError("more follows after its end")
                    decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
                    await checkpoint()  # there may be many, with nothing in them
                piece = decoder.decompress(chunk, CHUNK)
                chunk = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
                full = len(piece) == CHUNK and not decoder.eof
                if piece:
                    yield piece
    except zlib.error as error:
        raise httpx.DecodingError(str(error)) from error
    if not decoder.eof:
        raise httpx.RemoteProtocolError("its body ended too early")


# -- errors --------------------------------------------------------------------------------------------


def _where(using: AsyncClient | None, request: Request) -> str:
    if request.where:
        return request.where
    return shown(using.base_url.join(request.url) if using is not None else request.url)


def _too_much(using: AsyncClient | None, request: Request) -> TooLargeError:
    return TooLargeError(
        f"{request.what}: {_where(using, request)} sends more than {request.limit} bytes; that is not taken"
    )


def _too_slow(using: AsyncClient, request: Request, response: Response) -> StorageTransientError:
    asked = using.base_url.join(request.url).host
    sender = response.request.url.host
    via = "" if sender == asked else f", which sends us to {sender},"
    return StorageTransientError(
        f"{request.what}: {_where(using, request)}{via} is too slow: "
        f"less than {SLOWEST} bytes/s for {PACE:g} s; try again later"
    )


def _unusable(request: Request) -> BackendError:
    return BackendError(
        f"{request.what}: {request.where or 'its address'} is no address that HTTP can reach; "
        "give one like https://host/path"
    )


def _unreached(using: AsyncClient, request: Request, why: str) -> StorageTransientError:
    return StorageTransientError(
        f"{request.what}: {_where(using, request)} cannot be reached: {why}; try again later"
    )


def _distrust(error: BaseException) -> str | None:
    """Why a certificate was refused, if that is what an error comes from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return str(cause.verify_message)
        cause = cause.__cause__ or cause.__context__
    return None


def _in_words(error: Exception) -> str:
    if isinstance(error, (httpx.TimeoutException, httpcore.TimeoutException)):
        return "it did not answer in time"
    said = str(error)
    if isinstance(error, httpx.RemoteProtocolError):
        said = said.partition(": ")[0]  # what follows is what came, which may be what was sent: an echo
    return one_line(said, 200) or type(error).__name__
