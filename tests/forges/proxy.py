"""A forward proxy (RFC 9110, CONNECT) that leads to stand-ins: with it, and an authority of the tests' own,
what speaks to a public service by its public name over TLS speaks to the stand-in of it."""

from __future__ import annotations

import selectors
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import trustme
from tests.forges import server
from tests.forges.server import StandIn


@contextmanager
def internet(hosts: Mapping[str, StandIn], directory: Path) -> Iterator[dict[str, str]]:
    """The hosts, as they are reached with these environment variables."""
    authority = trustme.CA()
    bundle = directory / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    ports = {}
    with ExitStack() as stack:
        for host, stand_in in hosts.items():
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            authority.issue_cert(host).configure_cert(context)
            address = stack.enter_context(server.serving(stand_in, context))
            ports[host] = int(address.rpartition(":")[2])
            stand_in.url = f"https://{host}"
        proxy = stack.enter_context(_proxy(ports))
        yield {
            "HTTPS_PROXY": proxy,
            "SSL_CERT_FILE": str(bundle),
            "AWS_CA_BUNDLE": str(bundle),
            "NO_PROXY": "",
        }


@contextmanager
def _proxy(ports: Mapping[str, int]) -> Iterator[str]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline().split()
            while self.rfile.readline().strip():
                pass
            host = line[1].decode().partition(":")[0]
            if line[0] != b"CONNECT" or host not in ports:
                self.wfile.write(b"HTTP/1.1 502 No such host\r\nContent-Length: 0\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", ports[host])) as there:
                self.wfile.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                _pump(self.connection, there)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True
        request_queue_size = 128

        def handle_error(self, request: object, address: object) -> None:
            pass  # a peer that went

    with Server(("127.0.0.1", 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()
        thread.join()


def _pump(here: socket.socket, there: socket.socket) -> None:
    """Bytes both ways, until either side ends."""
    other = {here: there, there: here}
    with selectors.DefaultSelector() as selector:
        for each in other:
            selector.register(each, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                if not data:
                    return
                other[key.fileobj].sendall(data)  # type: ignore[index]
