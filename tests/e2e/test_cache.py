"""A source cache outside of the home: used by runs, and as closed to them as the home is."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from tests.e2e.harness import Site, until

FLOW = """
    import os
    from flowagent import Flow, task, Parameter
    from flowagent.storage import Local

    @task(log_stdout=True)
    def look(others):
        for other in others:
            try:
                print("read", len(open(other, "rb").read()))
            except OSError as error:
                print("not read", type(error).__name__)

    with Flow("{name}", storage=Local()) as flow:
        look(Parameter("others", default=[]))
    flow.register()
"""


@pytest.mark.parametrize("level", ["landlock", "namespace"])
def test_sources_elsewhere_are_used_and_closed(site: Site, level: str) -> None:
    # not below /tmp, which flows at level namespace have of their own
    cache = Path(f"/var/tmp/flowagent-test-{os.getpid()}-{level}")
    try:
        site.environment["FLOWAGENT_CACHE"] = str(cache)
        for name in ("one", "two"):
            site.python(site.write(f"{name}.py", FLOW.format(name=name)))
        site.start("--sandbox", level)
        run = site.submit("one")
        assert site.wait_for(run)["state"] == "completed"
        assert not (site.home / "sources").exists()
        files = [str(path) for path in cache.rglob("*") if path.is_file() and path.parent.name == "source"]
        assert files
        (cache / "note").write_text("what no flow may see")
        run = site.submit("two", "-p", f"others={[*files, str(cache / 'note')]}".replace("'", '"'))
        assert site.wait_for(run)["state"] == "completed", site.output(run)
        output = site.output(run)
        assert output.count("not read") == len(files) + 1 and "\nread" not in output, output
        assert "Local" in site.command("cache", "ls").stdout
    finally:
        site.close()
        subprocess.run(["chmod", "-R", "u+w", cache], check=True)
        shutil.rmtree(cache)


def old_mirror(site: Site, key: str) -> Path:
    """A mirror that was last used 40 days ago, as far as the cache knows of it."""
    made = site.home / "mirrors" / f"{key}.git"
    (made / "objects").mkdir(parents=True)
    (made / "objects" / "pack").write_bytes(b"x" * 5000)
    age(made.with_suffix(".lock"))
    return made


def age(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (0, time.time() - 40 * 86400))


def test_an_agent_keeps_to_the_limits_of_its_cache_and_sweeps_what_was_left(site: Site) -> None:
    for name in ("one", "two"):
        site.python(site.write(f"{name}.py", FLOW.format(name=name)))
    agent = site.start("--cache-max-age", "none")
    old, used = site.submit("one"), site.submit("two")
    for run in (old, used):
        assert site.wait_for(run)["state"] == "completed"
    sources = json.loads(site.command("cache", "ls", "--json").stdout)["sources"]
    assert len(sources) == 2
    age(site.home / "sources" / f"{sources[0]['key']}.lease")
    assert site.stop(agent) == 0
    unused, busy = old_mirror(site, "ab"), old_mirror(site, "cd")
    left = site.home / "mirrors" / ".tmp-ef-0123"
    (left / "objects").mkdir(parents=True)
    with open(busy.with_suffix(".lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        agent = site.start()
        until(lambda: not unused.exists() and not unused.with_suffix(".lock").exists())
        assert not left.exists()
        assert busy.exists()
        now = json.loads(site.command("cache", "ls", "--json").stdout)
        assert [entry["key"] for entry in now["sources"]] == [sources[1]["key"]]
        until(lambda: "kept the source cache within its limits" in site.log(agent))
    assert site.stop(agent) == 0
    agent = site.start("--cache-max-size", "4K", "--cache-max-age", "none")
    until(lambda: not busy.exists())
    assert site.stop(agent) == 0


def test_a_killed_prune_does_not_stop_the_next(site: Site) -> None:
    old_mirror(site, "ab")
    left = site.home / "mirrors" / ".tmp-ab" / "objects"
    left.mkdir(parents=True)
    assert site.command("cache", "prune").stdout.startswith("removed 0 sources and 1 mirror,")
    assert os.listdir(site.home / "mirrors") == []


def test_a_disk_that_is_nearly_full_takes_unused_mirrors_too(site: Site) -> None:
    unused = old_mirror(site, "ab")
    site.start("--reserve", "500T", "--cache-max-age", "none")
    until(lambda: not unused.exists())
