"""What a Git source costs a run, against what a user has today: a clone for each run.

    python benchmarks/git.py [--rounds 10] [--files 2000] [--commits 200] [--root DIR]...

Servers on loopback: git's own HTTP backend behind TLS and a password, and an sshd, which cost all rows alike.
For each transport, in one run and in turns: a commit that is cached, found by its branch and pinned; a fetch
with nothing new, by flowagent and by git, for ssh with the ssh client; a new commit of a known repository; a
first contact; against ``git ls-remote``, ``git clone --depth 1``, a full clone, and the floor of a new
commit: fetch into a bare mirror, read-tree, checkout-index. Milliseconds, minimum and median.
``--root``: where mirrors, sources and clones are; by default a directory on disk and one in /dev/shm.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "integration")]

from gitplace import Place, place  # noqa: E402
from tests.gitservers import (  # noqa: E402
    CLEAN,
    HttpServer,
    Repository,
    SshServer,
    certificate,
    git,
    http_server,
    sshd,
)

from flowagent_backends.git import remotes  # noqa: E402

LOGIN = {"bench": "password"}


def fill(repository: Repository, files: int, commits: int) -> None:
    random.seed(1)
    words = "".join(random.choice("abcdefgh \n") for _ in range(1 << 16))
    for number in range(files):
        start = random.randrange(1 << 15)
        repository.write(
            f"pkg{number % 40:02}/f{number}.py", words[start : start + random.randint(500, 20000)]
        )
    repository.write("flow.py", "0")
    repository.commit("first", False)
    for number in range(commits):
        repository.write("flow.py", str(number))
        repository.write(f"pkg{number % 40:02}/f{number % files}.py", words[number:9000])
        repository.commit("more", False)
    repository.push()
    git("gc", "-q", cwd=repository.bare)


class Rows:
    """What was measured, by row."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    async def take(self, row: str, job: Callable[[], Awaitable[Any]]) -> None:
        began = time.perf_counter()
        await job()
        self.times.setdefault(row, []).append((time.perf_counter() - began) * 1000)

    def show(self, title: str) -> None:
        print(f"\n{title}\n{'':44}{'min':>9}{'median':>9}")
        for row, times in self.times.items():
            print(f"{row:44}{min(times):9.1f}{statistics.median(times):9.1f}")

    def ratio(self, row: str, floor: str) -> float:
        return statistics.median(self.times[row]) / statistics.median(self.times[floor])


async def program(*args: str, env: dict[str, str]) -> None:
    nowhere = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec("git", *args, env=env, stdout=nowhere, stderr=nowhere)
    assert await process.wait() == 0, args


async def measure(
    url: str, repository: Repository, root: Path, rounds: int, env: dict[str, str], home: Path
) -> Rows:
    rows = Rows()
    bare, index = root / "floor.git", root / "floor.index"
    await program("init", "-q", "--bare", str(bare), env=env)
    quiet = ("-c", "gc.auto=0", "-c", "maintenance.auto=false")
    fetch = ("-C", str(bare), *quiet, "fetch", "-q", "--no-tags", url, "+refs/heads/main:refs/heads/main")
    await program(*fetch, env=env)
    environ = {"HOME": str(home)}
    async with place(root / "known", environ=environ) as here:
        await hold(here, url)
        await nothing_new(here, url, [])
        for number in range(rounds):
            pinned = {"commit": repository.head}
            await rows.take("same commit again", lambda: hold(here, url))
            await hold(here, url, **pinned)
            await rows.take("same commit again, pinned", lambda pinned=pinned: hold(here, url, **pinned))
            await rows.take(
                "  git ls-remote", lambda: program("ls-remote", "-q", url, "refs/heads/main", env=env)
            )
            await nothing_new(here, url, rows.times.setdefault("fetch with nothing new", []))
            await rows.take("  git fetch with nothing new", lambda: program(*fetch, env=env))
            repository.write("flow.py", f"new {number} {random.random()}")
            repository.commit()
            await rows.take("new commit", lambda: hold(here, url))
            tree = root / f"floor-{number}"
            tree.mkdir()

            async def floor(tree: Path = tree) -> None:
                await program(*fetch, env=env)
                inside = {**env, "GIT_INDEX_FILE": str(index), "GIT_WORK_TREE": str(tree)}
                await program("-C", str(bare), "read-tree", "refs/heads/main", env=inside)
                await program("-C", str(bare), "checkout-index", "-a", "-f", env=inside)

            await rows.take("  bare fetch, read-tree, checkout-index", floor)
            shutil.rmtree(tree)
            await rows.take("  git clone --depth 1", lambda: clone(root, url, env, "--depth", "1"))
            if number < 3:
                await rows.take("  git clone", lambda: clone(root, url, env))
                async with place(root / f"first-{number}", environ=environ) as other:
                    await rows.take("first contact", lambda other=other: hold(other, url))
                await asyncio.to_thread(
                    os.system, f"chmod -R u+w {root}/first-{number} && rm -rf {root}/first-{number}"
                )
    return rows


async def hold(here: Place, url: str, **options: Any) -> None:
    _, source = await here.hold(here.of(url, **options))
    source.close()


async def nothing_new(here: Place, url: str, times: list[float]) -> None:
    """A fetch alone, in a mirror that has all that it can bring, or will have from then on."""
    remote = remotes.of_storage(here.of(url), here.backend._context.secrets)
    async with here.backend._mirrors.open(remote, history=True) as mirror:
        began = time.perf_counter()
        await mirror.fetch_history(1 << 33)
        times.append((time.perf_counter() - began) * 1000)


async def clone(root: Path, url: str, env: dict[str, str], *options: str) -> None:
    target = root / "clone"
    await program("clone", "-q", *options, url, str(target), env=env)
    await asyncio.to_thread(shutil.rmtree, target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--commits", type=int, default=200)
    parser.add_argument("--root", type=Path, action="append")
    options = parser.parse_args()
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flowagent-bench-")))
        base.chmod(0o755)
        repository = Repository.make(base / "repos", "org/bench")
        fill(repository, options.files, options.commits)
        http: HttpServer = stack.enter_context(http_server(base / "repos", certificate(base), logins=LOGIN))
        ssh: SshServer = stack.enter_context(sshd(base / "repos", base / "client" / ".ssh"))
        known = base / "client" / ".ssh"
        command = f"ssh -o BatchMode=yes -o UserKnownHostsFile={known}/known_hosts -i {known}/id_ed25519"
        os.environ["SSL_CERT_FILE"] = str(base / "cert.pem")
        env = {**CLEAN, "GIT_SSH_COMMAND": command, "GIT_SSL_CAINFO": str(base / "cert.pem")}
        for parent in options.root or [Path("/var/tmp"), Path("/dev/shm")]:
            for name, url in (
                ("https", http.url("org/bench", "bench:password")),
                ("ssh", ssh.url("org/bench")),
            ):
                root = Path(tempfile.mkdtemp(prefix="flowagent-bench-", dir=parent))
                try:
                    rows = asyncio.run(measure(url, repository, root, options.rounds, env, base / "client"))
                finally:
                    os.system(f"chmod -R u+w {root} && rm -rf {root}")
                rows.show(f"{name}, {parent}: {options.files} files, {options.commits} commits")
                new = rows.ratio("new commit", "  bare fetch, read-tree, checkout-index")
                again = rows.ratio("same commit again", "  git clone --depth 1")
                idle = rows.ratio("fetch with nothing new", "  git fetch with nothing new")
                print(
                    f"new commit / floor: {new:.2f}; same commit / clone --depth 1: {again:.4f}; "
                    f"fetch with nothing new / by git: {idle:.2f}"
                )


if __name__ == "__main__":
    main()
