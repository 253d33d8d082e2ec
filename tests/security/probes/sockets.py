"""Services outside that do what they are asked for by this user."""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress

from . import World, probe

SAME_USER = "at level process a flow reaches what the user may reach that it runs as"


def _connects(address: str, kind: int = socket.SOCK_STREAM) -> bool:
    """Whether somebody outside is heard to: what listens says hello."""
    with socket.socket(socket.AF_UNIX, kind) as client:
        client.settimeout(2)
        client.connect(address)
        return client.recv(5) == b"hello"


@probe("a container engine: /run/docker.sock", "VBB", run_as="BBB", why=SAME_USER)
def docker(world: World) -> bool:
    return _connects("/run/docker.sock")


@probe("a container engine that was started after the agent", "VBB", run_as="BBB", why=SAME_USER)
def docker_started_late(world: World) -> bool:
    return _connects("/run/podman/podman.sock")


@probe("the user's D-Bus and systemd: /run/user/UID/bus", "VBB", run_as="BBB", why=SAME_USER)
def user_bus(world: World) -> bool:
    return _connects(world.runtime_directory + "/bus")


@probe("the system's D-Bus", "VBB", why=SAME_USER)
def system_bus(world: World) -> bool:
    return _connects("/run/dbus/system_bus_socket")


@probe("the agent's own ssh-agent: SSH_AUTH_SOCK", "VBB", run_as="BBB", why=SAME_USER)
def ssh_agent(world: World) -> bool:
    return _connects(world.ssh_agent)


@probe(
    "an ssh-agent of the same user that the agent does not know of, in /tmp",
    "VBB",
    run_as="BBB",
    why=SAME_USER,
)
def other_ssh_agent(world: World) -> bool:
    return _connects(world.other_ssh_agent)


@probe("terminals of tmux and screen, open to type into", "VBB", run_as="BBB", why=SAME_USER)
def tmux(world: World) -> bool:
    return _connects(world.tmux)


@probe(
    "a connection that ssh keeps open (ControlMaster) and the agent of gpg",
    "VBB",
    run_as="BBB",
    why=SAME_USER,
)
def ssh_master(world: World) -> bool:
    return _connects(world.user_home + "/.ssh/master") or _connects(world.user_home + "/.gnupg/S.gpg-agent")


@probe("an abstract socket of a service outside", "VBB", why=SAME_USER)
def abstract_socket(world: World) -> bool:
    return _connects("\0" + world.abstract)


@probe("a service at any other path, such as a database's", "VBB", why=SAME_USER)
def other_service(world: World) -> bool:
    return _connects("/run/postgresql/.s.PGSQL.5432")


@probe("a service at any other path that was started after the agent", "VBB", why=SAME_USER)
def late_service(world: World) -> bool:
    return _connects("/run/late-service/socket")


@probe(
    "a service that takes datagrams, at any other path",
    "VBB",
    run_as="BBB",
    why=SAME_USER,
)
def datagrams(world: World) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect("/run/some-service/control")
        return client.send(b"probe") > 0


@probe("what another run listens on", "VBB", why=SAME_USER)
def socket_of_another_run(world: World) -> bool:
    directory = os.open(world.victim_directory + "/work", os.O_PATH)
    return _connects(f"/proc/self/fd/{directory}/socket")


@probe(
    "a service in a directory that the operator allowed to be read",
    "AAA",
    why="--allow-read or --allow-write, of the socket or a directory above",
)
def allowed_service(world: World) -> bool:
    return _connects("/run/allowed/socket")


@probe(
    "who looks up names of hosts: nscd, systemd-resolved",
    "AAB",
    why="the network needs names; what cannot ask there, asks by DNS itself",
)
def looking_up_names(world: World) -> bool:
    return _connects("/run/nscd/socket") and _connects("/run/systemd/resolve/io.systemd.Resolve")


@probe("the log of the system: journald and syslog", "AAA", why="a line of text, which the log signs")
def logging(world: World) -> bool:
    return _connects("/run/systemd/journal/stdout")


def _talks_to_a_launcher(path: str) -> dict[str, object]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(2)
        directory = os.open(os.path.dirname(path), os.O_PATH)
        client.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        client.send(json.dumps({"nonce": "00"}).encode())
        answer: dict[str, object] = json.loads(client.recv(65536))
        if "nonce" in answer:
            client.send(json.dumps({"proof": "0" * 64}).encode())
            with suppress(ConnectionError):
                client.send(json.dumps({"op": "exit"}).encode())
                answer["heard"] = bool(client.recv(65536))
        return answer


@probe(
    "the launcher's socket: to be heard at all",
    "VBB",
    run_as="BBB",
    why="the key, which is checked before anything is obeyed, is what keeps it apart",
)
def launcher_socket(world: World) -> bool:
    return bool(_talks_to_a_launcher(world.launcher_socket))


@probe("the launcher's socket: to be obeyed without the key", "BBB", everywhere=False)
def launcher_without_key(world: World) -> bool:
    return bool(_talks_to_a_launcher(world.launcher_socket).get("heard"))


@probe(
    "ringing the agent's doorbells", "VBB", run_as="BBB", why="a ring only makes the agent look at its store"
)
def doorbell(world: World) -> bool:
    bells = world.home + "/flowagent.db.bells"
    directory = os.open(bells, os.O_PATH)
    names = [name for name in os.listdir(bells) if name.endswith(".sock")]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        if not names:
            raise FileNotFoundError(errno.ENOENT, "no doorbell is to be seen")
        client.connect(f"/proc/self/fd/{directory}/{names[0]}")
        return client.send(b"!") == 1


@probe("systemd's notification socket of the agent: NOTIFY_SOCKET", "VBB", run_as="BBB", why=SAME_USER)
def notification_socket(world: World) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect("/run/systemd/notify")
        return client.send(b"STATUS=probe") > 0
