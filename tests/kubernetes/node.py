"""The one node of the tests' cluster: a kubelet and a Docker engine in namespaces of their own.

Its network is a wire to this machine, its mounts are private, and its processes end with its first one, so
that nothing of it stays. What kubelet would set on the machine it sets in files that lie over those of /proc.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.containers import images
from tests.containers.machinery import BARE, OLD, PYTHON, wait_for

NAME, PAUSE = "node", "base/pause:1"
TUNABLES = (
    "vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
)  # fmt: skip
CONTROLLERS = (
    "cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "hugetlb", "systemd",
    "unified",
)  # fmt: skip
CGROUPS = Path("/sys/fs/cgroup")
BOOT = r"""
set -eu
mount --make-rshared /
root=$1
shift
mkdir -p "$root/lib" "$root/log" "$root/tunables"
mount --bind "$root/lib" /var/lib
mount --bind "$root/log" /var/log
mount -t tmpfs tmpfs /run
for tunable; do
    [ -e "/proc/sys/$tunable" ] || continue
    file=$root/tunables/$(basename "$tunable")
    cat "/proc/sys/$tunable" >"$file"
    mount --bind "$file" "/proc/sys/$tunable"
done
touch "$root/booted"
exec tini -s -- sleep infinity
"""
RUNC = r"""#!/bin/sh
# Without CAP_SYS_RESOURCE nobody is protected from the kernel's choice when memory is short: asks for it go.
bundle=
previous=
for argument; do
    [ "$previous" = --bundle ] && bundle=$argument
    previous=$argument
done
[ -n "$bundle" ] && sed -i 's/"oomScoreAdj": *-[0-9]*/"oomScoreAdj":0/' "$bundle/config.json"
exec runc "$@"
"""


class Node:
    """A machine as far as the cluster can tell: it can lose its network, its kubelet, or its power."""

    def __init__(self, root: Path, binaries: Path) -> None:
        self.root = root
        self.binaries = binaries
        root.mkdir(parents=True)
        self.address, self.own = _addresses()
        """This machine's address on the wire, and the node's."""
        self.cgroup = f"flowagent-{root.parent.name}-{os.getpid()}"
        self.docker_url = f"unix://{root}/docker.sock"
        self._wire = f"fa{os.getpid()}"[:15]
        self._network: subprocess.Popen[bytes] | None = None
        self._power: subprocess.Popen[bytes] | None = None
        self._engine: subprocess.Popen[bytes] | None = None
        self._kubelet: subprocess.Popen[bytes] | None = None
        wrapper = root / "runc"
        wrapper.write_text(RUNC)
        wrapper.chmod(0o755)

    # the network

    def connect(self) -> None:
        """Lay the wire; from now on this machine has ``address``."""
        if self._network is None:
            self._network = run(self.root / "network.log", "unshare", "--net", "sleep", "infinity")
            mine = os.readlink("/proc/self/ns/net")
            pid = self._network.pid
            wait_for(lambda: os.readlink(f"/proc/{pid}/ns/net") != mine, 10, lambda: "no network namespace")
            _ip("link", "add", self._wire, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
            _ip("address", "add", f"{self.address}/24", "dev", self._wire)
            _ip("link", "set", self._wire, "up")
            self._inside("ip", "link", "set", "lo", "up")
            self._inside("ip", "address", "add", f"{self.own}/24", "dev", "eth0")
        self._inside("ip", "link", "set", "eth0", "up")
        self._inside("ip", "route", "replace", "default", "via", self.address)

    def disconnect(self) -> None:
        """Cut the wire. What runs on the node goes on; ``connect`` mends it."""
        self._inside("ip", "link", "set", "eth0", "down")

    def _inside(self, *command: str) -> None:
        assert self._network is not None
        subprocess.run(["nsenter", "-t", str(self._network.pid), "-n", *command], check=True, timeout=20)

    def redirect(self, service: str, port: int) -> None:
        """Lead pods that ask for the API at its address in the cluster to it: kube-proxy's part."""
        self._inside(
            "iptables", "-w", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "-d", service, "--dport", "443",
            "-j", "DNAT", "--to-destination", f"{self.address}:{port}",
        )  # fmt: skip

    # power and its engine

    def boot(self) -> None:
        """Power on, with the Docker engine, but without kubelet."""
        assert self._network is not None
        for controller in CONTROLLERS:
            if (CGROUPS / controller / "cgroup.procs").exists():
                _make_cgroup(CGROUPS / controller / self.cgroup)
        (self.root / "booted").unlink(missing_ok=True)
        self._power = run(
            self.root / "boot.log",
            "nsenter", "-t", str(self._network.pid), "-n",
            "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
            "sh", "-c", BOOT, "boot", str(self.root), *TUNABLES,
        )  # fmt: skip
        wait_for((self.root / "booted").exists, 10, lambda: tail(self.root / "boot.log"))
        self._engine = self._enter(
            "dockerd",
            "dockerd", "--data-root", f"{self.root}/docker", "--exec-root", "/run/docker",
            "--pidfile", "/run/docker.pid", "-H", self.docker_url, "-H", "unix:///run/docker.sock",
            "--add-runtime", f"clamped={self.root}/runc", "--default-runtime", "clamped",
            "--cgroup-parent", f"/{self.cgroup}/docker", "--ip6tables=false",
            "--insecure-registry", f"{self.address}/32",  # without TLS, at this machine's end of the wire
        )  # fmt: skip
        wait_for(self._engine_answers, 30, lambda: tail(self.root / "dockerd.log"))

    def _engine_answers(self) -> bool:
        return not self._docker("version", check=False).returncode

    def docker(self, *arguments: str) -> str:
        """Run the docker command on the node's engine; what it printed."""
        return self._docker(*arguments, check=True).stdout

    def _docker(self, *arguments: str, check: bool) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DOCKER_HOST": self.docker_url}
        return subprocess.run(
            ["docker", *arguments], env=environment, capture_output=True, text=True, timeout=60, check=check
        )

    def build_images(self) -> None:
        """Those of the containers' tests, and what holds a pod's network."""
        archive = self.root / "image.tar"
        images.without_python(archive)
        self.docker("import", str(archive), BARE)
        self.docker("import", "--change", 'ENTRYPOINT ["/bin/sleep", "infinity"]', str(archive), PAUSE)
        images.with_old(archive)
        self.docker("import", str(archive), OLD)
        images.with_python(archive)
        self.docker("import", str(archive), PYTHON)
        archive.unlink()

    def kill(self) -> None:
        """Power off: engine, kubelet and containers end at once, unasked."""
        if self._power is None:
            return
        if self._power.poll() is None:
            os.kill(_child(self._power), signal.SIGKILL)
        for process in (self._power, self._engine, self._kubelet):
            if process is not None:
                process.wait(20)
        self._power = self._engine = self._kubelet = None

    # kubelet

    def start_kubelet(self, kubeconfig: Path) -> None:
        settings = self.root / "kubelet.json"
        settings.write_text(json.dumps(self._settings()))
        self._kubelet = self._enter(
            "kubelet",
            str(self.binaries / "kubelet"), "--config", str(settings), "--kubeconfig", str(kubeconfig),
            "--hostname-override", NAME, "--node-ip", self.own, "--pod-infra-container-image", PAUSE,
            "--volume-plugin-dir", f"{self.root}/lib/plugins",
        )  # fmt: skip

    def stop_kubelet(self) -> None:
        """Containers go on without it."""
        assert self._kubelet is not None
        os.kill(_child(self._kubelet), signal.SIGKILL)
        self._kubelet.wait(20)
        self._kubelet = None

    def _settings(self) -> Mapping[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "evictionHard": {"memory.available": "10Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
            "failSwapOn": False,
            "healthzPort": 0,
            "imageGCHighThresholdPercent": 100,
            "kubeAPIBurst": 100,
            "kubeAPIQPS": 50,
            "makeIPTablesUtilChains": False,
            "nodeLeaseDurationSeconds": 4,
            "nodeStatusReportFrequency": "1s",
            "nodeStatusUpdateFrequency": "1s",
            "oomScoreAdj": 0,
            "readOnlyPort": 0,
            "resolvConf": "",
            "syncFrequency": "10s",
        }

    def _enter(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a program on the node; the process is that of nsenter, which waits for it."""
        assert self._power is not None
        return run(
            self.root / f"{name}.log", "nsenter", "-t", str(_child(self._power)), "-m", "-n", "-p", *command
        )

    def close(self) -> None:
        self.kill()
        if self._network is not None:
            self._network.kill()
            self._network.wait(20)
        for controller in CONTROLLERS:
            _remove_cgroup(CGROUPS / controller / self.cgroup)


def run(log: Path, *command: str) -> subprocess.Popen[bytes]:
    """Start a program that ends with the tests, however these end."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with open(log, "ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command], stdout=output, stderr=output, env=environment
        )


def tail(log: Path) -> str:
    return f"{log}: {log.read_text(errors='replace')[-3000:]}"


def _child(process: subprocess.Popen[bytes]) -> int:
    """The process that nsenter or unshare has forked to be in the namespace."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found: list[str] = []

    def forked() -> bool:
        found[:] = children.read_text().split()
        return bool(found)

    wait_for(forked, 10, lambda: f"{process.args!r} has no child")
    return int(found[0])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)


def _addresses() -> tuple[str, str]:
    """Two addresses of a network that this machine does not know."""
    known = subprocess.run(
        ["ip", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=True
    )
    for number in range(256):
        network = ipaddress.ip_network(f"10.213.{(os.getpid() + number) % 256}.0/24")
        if not re.search(rf"\b{re.escape(str(network[0]))[:-1]}", known.stdout):
            return str(network[1]), str(network[2])
    raise AssertionError("no network is free in 10.213.0.0/16")


def _make_cgroup(path: Path) -> None:
    path.mkdir(exist_ok=True)
    for name in ("cpuset.cpus", "cpuset.mems"):
        with suppress(FileNotFoundError):
            (path / name).write_text((path.parent / name).read_text())


def _remove_cgroup(path: Path) -> None:
    """Deepest first; processes that have been killed take a moment to leave."""
    end = time.monotonic() + 5
    while path.exists() and time.monotonic() < end:
        for directory, _, _ in os.walk(path, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)
        if path.exists():
            time.sleep(0.05)
