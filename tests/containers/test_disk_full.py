"""An engine whose disk is full: each thing that needs room says so, and all goes on when there is some."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.containers import machinery
from tests.containers.conftest import start
from tests.containers.machinery import Engine
from tests.containers.test_runs import register, text
from tests.containers.test_storage import script
from tests.e2e.harness import Site

SIZE = 512 << 20
GREEDY = """
print("begins", flush=True)
with open("/tmp/all", "wb") as file:
    while True:
        try:
            file.write(bytes(1 << 16))
            file.flush()
        except OSError:
            print("no room", flush=True)
            break
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with little room."""
    machinery.check_programs()
    root = Path(tempfile.mkdtemp(prefix="fa-small-"))
    (root / "data").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", root / "data"], check=True)
    engine = Engine(root)
    try:
        engine.start()
        engine.build_images()
        yield engine
        engine.close()
    finally:
        subprocess.run(["umount", "--lazy", root / "data"], check=True)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def ballast(engine: Engine) -> Iterator[Path]:
    """A file that takes what room there is, as long as it is there."""
    path = engine.root / "data/ballast"
    path.write_bytes(b"")
    fill(path)
    yield path
    path.unlink(missing_ok=True)


def fill(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


def test_an_image_cannot_be_built(site: Site, ballast: Path) -> None:
    file = script(site, "large", files={str(site.write("data", "x" * 100_000)): "/data"})
    said = site.command("register", file, code=None)
    assert said.returncode != 0
    assert "the engine's disk is full" in said.stderr and "docker system prune" in said.stderr, said.stderr
    ballast.unlink()
    site.command("register", file)


def test_a_container_cannot_be_made(site: Site, engine: Engine, ballast: Path) -> None:
    ballast.unlink()
    start(site)
    register(site, "made", "print('made')")
    site.wait_for(site.submit("made"))
    ballast.write_bytes(b"")
    fill(ballast)
    shown = site.wait_for(site.submit("made"))
    assert shown["state"] == "crashed", shown
    assert "the engine's disk is full" in shown["reason"], shown["reason"]
    ballast.unlink()
    run = site.submit("made")
    assert site.wait_for(run)["state"] == "completed"
    assert text(site, run) == "made\n"


def test_a_flow_fills_it(site: Site, engine: Engine, ballast: Path) -> None:
    """Room for its end is kept; what it says then may not get into the engine's log any more."""
    os.truncate(ballast, ballast.stat().st_size - (32 << 20))
    start(site)
    register(site, "greedy", GREEDY)
    run = site.submit("greedy")
    shown = site.wait_for(run)
    assert (shown["state"], text(site, run)) == ("completed", "begins\nno room\n"), shown
    register(site, "loud", GREEDY + "print('x' * 100_000, flush=True)")
    run = site.submit("loud")
    shown = site.wait_for(run)
    assert shown["state"] == "crashed" and "its log on the engine is cut" in shown["reason"], shown
    assert text(site, run) == "begins\nno room\n"
    ballast.unlink()
    register(site, "after", "print('after')")
    assert site.wait_for(site.submit("after"))["state"] == "completed"
