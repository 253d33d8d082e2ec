"""Services outside of the sandbox, in the jail: what listens says "hello" to whoever comes."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import sys
import threading


def listen(path: str, uid: int, mode: int) -> None:
    """A stream socket of a user."""
    directory = os.path.dirname(path)
    if not path.startswith("\0"):
        os.makedirs(directory, exist_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(path)
    if not path.startswith("\0"):
        os.chmod(path, mode)
        os.chown(path, uid, uid)
    server.listen(64)
    threading.Thread(target=greet, args=[server], daemon=True).start()


def greet(server: socket.socket) -> None:
    while True:
        client, _ = server.accept()
        client.sendall(b"hello")
        client.close()


def greet_datagrams(server: socket.socket) -> None:
    while True:
        _, peer = server.recvfrom(64)
        server.sendto(b"hello", peer)


def tcp() -> int:
    server = socket.create_server(("127.0.0.1", 0))
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)
    threading.Thread(target=greet, args=[server], daemon=True).start()
    return int(server.getsockname()[1])


def serve(uid: int, abstract: str) -> None:
    for path, mode in (
        ("/run/docker.sock", 0o660),
        ("/run/dbus/system_bus_socket", 0o666),
        (f"/run/user/{uid}/bus", 0o600),
        ("/run/postgresql/.s.PGSQL.5432", 0o777),
        ("/run/some-service/socket", 0o666),
        ("/run/allowed/socket", 0o666),
        ("/run/nscd/socket", 0o666),
        ("/run/systemd/resolve/io.systemd.Resolve", 0o666),
        ("/run/systemd/journal/stdout", 0o666),
        ("/tmp/known-agent/agent.1", 0o600),
        ("/tmp/ssh-unknown/agent.2", 0o600),
        (f"/tmp/tmux-{uid}/default", 0o600),
        (sys.argv[3] + "/.ssh/master", 0o600),
        ("\0" + abstract, 0),
    ):
        listen(path, uid, mode)
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    os.makedirs("/run/systemd", exist_ok=True)
    notify.bind("/run/systemd/notify")
    os.chown("/run/systemd/notify", uid, uid)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    control.bind("/run/some-service/control")
    os.chown("/run/some-service/control", uid, uid)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    threading.Thread(target=greet_datagrams, args=[udp], daemon=True).start()
    _leader, follower = os.openpty()
    terminal = os.ttyname(follower)
    os.chown(terminal, uid, uid)
    os.chmod(terminal, 0o620)
    program = "/mnt/setuid-id"
    shutil.copyfile("/usr/bin/id", program)
    os.chmod(program, 0o4755)
    for directory in ("/tmp", "/var/tmp", "/dev/shm", "/run/user"):
        with open(directory + "/mark-of-outside", "w"):
            pass
    said = {
        "port": tcp(),
        "other_port": tcp(),
        "udp_port": udp.getsockname()[1],
        "terminal": terminal,
        "terminal_device": os.stat(terminal).st_rdev,
        "ipc_namespace": os.readlink("/proc/self/ns/ipc"),
        "setuid": program,
        "ssh_agent": "/tmp/known-agent/agent.1",
        "other_ssh_agent": "/tmp/ssh-unknown/agent.2",
        "tmux": f"/tmp/tmux-{uid}/default",
        "runtime_directory": f"/run/user/{uid}",
        "abstract": abstract,
    }
    print(json.dumps(said), flush=True)
    sys.stdin.readline()  # the agent is there now
    listen("/run/podman/podman.sock", uid, 0o660)
    listen("/run/late-service/socket", uid, 0o666)
    print("late", flush=True)
    select.select([sys.stdin], [], [])  # until the test is done
    while sys.stdin.read(1):
        pass


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
