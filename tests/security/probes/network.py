"""What is left of the network when a flow declares that it needs none, or only certain ports.

These probes are executed by flows of their own: ``none`` by one with ``network=False``, ``ports`` by one that
may connect to one TCP port.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

from . import World, probe

PORTS = "landlock"
IPPROTO_MPTCP = 262
MSG_FASTOPEN = 0x20000000


def _tcp(port: int, protocol: int = 0) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as client:
        client.settimeout(2)
        client.connect(("127.0.0.1", port))
        return client.recv(5) == b"hello"


def _none(
    title: str, expected: str = "BBB", why: str = "", everywhere: bool = True
) -> Callable[[Callable[[World], bool]], Callable[[World], bool]]:
    return probe("network=False: " + title, expected, why=why, everywhere=everywhere)


def _ports(
    title: str, expected: str = "BBB", why: str = ""
) -> Callable[[Callable[[World], bool]], Callable[[World], bool]]:
    return probe('network={"connect": [PORT]}: ' + title, expected, why=why)


@_none("TCP")
def none_tcp(world: World) -> bool:
    return _tcp(world.port)


@_none("UDP")
def none_udp(world: World) -> bool:
    return _udp(world)


def _udp(world: World) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        client.sendto(b"hello?", ("127.0.0.1", world.udp_port))
        return client.recv(5) == b"hello"


@_none("a port to listen on")
def none_listening(world: World) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", 0))
        return True


@_none("netlink")
def none_netlink(world: World) -> bool:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
    return True


@_none("raw sockets")
def none_raw(world: World) -> bool:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
    return True


@_none("AF_VSOCK, to the host of a virtual machine")
def none_vsock(world: World) -> bool:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    return True


@_none("the kernel's cryptography (AF_ALG) and other families", everywhere=False)
def none_other_families(world: World) -> bool:
    made = []
    for family in (socket.AF_ALG, socket.AF_PACKET, socket.AF_TIPC, socket.AF_CAN, 44):
        try:
            made.append(
                socket.socket(family, socket.SOCK_RAW if family != socket.AF_ALG else socket.SOCK_SEQPACKET)
            )
        except OSError as error:
            problem = error
    if not made:
        raise problem
    return True


@_none(
    "names of hosts, by asking nscd or systemd-resolved on their sockets",
    expected="VBB",
    why="only a higher level covers sockets",
)
def none_names(world: World) -> bool:
    reached = []
    for path in ("/run/nscd/socket", "/run/systemd/resolve/io.systemd.Resolve"):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            reached.append(client.recv(5) == b"hello")
    return any(reached)


@_ports("that port", "AAA", why="it was asked for, and level landlock or better is used then")
def ports_the_declared_one(world: World) -> bool:
    return _tcp(world.port)


@_ports("another TCP port")
def ports_another(world: World) -> bool:
    return _tcp(world.other_port)


@_ports("another port by multipath TCP, which Landlock does not see")
def ports_multipath(world: World) -> bool:
    return _tcp(world.other_port, IPPROTO_MPTCP)


@_ports("another port by TCP Fast Open, without connect(2)")
def ports_fast_open(world: World) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.sendto(b"x", MSG_FASTOPEN, ("127.0.0.1", world.other_port))
        return client.recv(5) == b"hello"


@_ports("raw sockets, packets, AF_VSOCK")
def ports_other_families(world: World) -> bool:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    return True


@_ports(
    "UDP",
    "AAA",
    why="names are looked up by it; the rule is about TCP, use network=False where that is too much",
)
def ports_udp(world: World) -> bool:
    return _udp(world)
