"""A machine with systemd as its first process: this one's own file system, under a layer that is thrown away.

systemd-nspawn boots it in about a second. Nothing in it is seen outside but its processes. The code under
test and what it imports are mounted, so that all users can read them, wherever the repository is.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PREFIX = "/srv/flowagent"
PROGRAM = f"{PREFIX}/bin/flowagent"
MOUNTED = {
    **{ROOT / name: f"/srv/repository/{name}" for name in ("agent", "backends", "systemd")},
    Path(sysconfig.get_path("purelib")): "/srv/packages",
}
SITE = sysconfig.get_path("purelib", "posix_prefix", {"base": PREFIX})
INSTALL = f"""
set -e
{sys._base_executable} -m venv --without-pip {PREFIX}
printf '%s\\n' /srv/repository/agent /srv/repository/backends /srv/packages > {SITE}/all.pth
printf '#!{PREFIX}/bin/python\\nfrom flowagent.cli import main\\nmain()\\n' > {PROGRAM}
chmod +x {PROGRAM}
"""
TARGET = """
[Unit]
Description=all that a service needs
Requires=basic.target
After=basic.target
AllowIsolate=yes
"""


class Machine:
    """Booted when made. Commands are run in it as root."""

    def __init__(self, directory: Path) -> None:
        missing = [name for name in ("systemd-nspawn", "nsenter") if shutil.which(name) is None]
        assert not missing, (
            f"{missing} are missing; tests/run installs them: apt-get install systemd-container"
        )
        assert os.geteuid() == 0, (
            "this test boots a container, as root: sudo tests/run tests/e2e/test_systemd.py"
        )
        self.root = directory / "machine"
        self.root.mkdir()
        target = directory / "test.target"
        target.write_text(TARGET)
        self.log = directory / "boot.log"
        subprocess.run(["mount", "--bind", "/", self.root], check=True)
        with open(self.log, "wb") as log:
            self._nspawn = subprocess.Popen(
                [
                    "systemd-nspawn",
                    *("--quiet", "--register=no", "--keep-unit", "--boot", "--directory", self.root),
                    *("--volatile=overlay", "--private-network", "--console=read-only"),
                    # the container's own filter is older than Landlock
                    "--system-call-filter=landlock_create_ruleset landlock_add_rule landlock_restrict_self",
                    f"--bind-ro={target}:/etc/systemd/system/test.target",
                    *(f"--bind-ro={here}:{there}" for here, there in MOUNTED.items()),
                    "systemd.unit=test.target",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._first = self._first_process()
            self.until("systemctl is-active test.target", "active")
            self._install()
        except BaseException:
            self.close()
            raise

    def _first_process(self) -> int:
        end = time.monotonic() + 30
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")
        while True:
            assert self._nspawn.poll() is None, f"the container does not boot: {self.log.read_text()}"
            with suppress(OSError):
                for pid in children.read_text().split():
                    if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd":
                        return int(pid)
            assert time.monotonic() < end, f"the container does not come up: {self.log.read_text()}"
            time.sleep(0.02)

    def run(self, command: str, code: int | None = 0, timeout: float = 60) -> str:
        """What a shell command in the machine prints; its exit code must be ``code`` unless that is None."""
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": "/root"}
        done = subprocess.run(
            ["nsenter", "-t", str(self._first), "-m", "-u", "-i", "-n", "-p", "sh", "-c", command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            cwd="/",
        )
        assert code is None or done.returncode == code, (
            f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout + done.stderr

    def until(self, command: str, wanted: str, timeout: float = 60) -> str:
        """Repeat a command until what it prints has ``wanted`` in it; all of what it printed."""
        end = time.monotonic() + timeout
        while wanted not in (printed := self.run(command, code=None)).split("\n") and wanted not in printed:
            assert time.monotonic() < end, f"{command} never printed {wanted!r}, but {printed!r}"
            time.sleep(0.1)
        return printed

    def _install(self) -> None:
        """Have flowagent for all users. Python may be in root's own home: in here, they may enter that."""
        for parent in Path(os.path.realpath(sys.executable)).parents:
            self.run(f"chmod o+x '{parent}'")
        self.run(INSTALL)

    def close(self) -> None:
        with suppress(AttributeError, ProcessLookupError):
            os.kill(self._first, signal.SIGRTMIN + 4)  # power off
        try:
            self._nspawn.wait(20)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()
        subprocess.run(["umount", "--lazy", self.root], check=True)
