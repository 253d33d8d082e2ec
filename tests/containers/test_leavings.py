"""What agents leave in an engine and what others do to it: volumes that are pruned, containers of agents that
were killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.containers.conftest import start
from tests.containers.machinery import PYTHON, Engine
from tests.containers.test_runs import register, text
from tests.e2e.harness import Site, until

from flowagent.runners.docker import DockerRunner
from flowagent.settings import load

GROUND = "label=flowagent.ground"


def volumes(engine: Engine) -> set[str]:
    return set(engine.docker("volume", "ls", "-q", "--filter", GROUND).split())


def anonymous(engine: Engine) -> set[str]:
    return {name for name in engine.docker("volume", "ls", "-q").split() if len(name) == 64}


def seeding(engine: Engine, image: str) -> list[str]:
    return engine.docker("ps", "-aq", "--filter", GROUND, "--filter", f"ancestor={image}").split()


def test_an_agent_whose_volume_was_pruned_fills_it_again(site: Site, engine: Engine) -> None:
    start(site)
    register(site, "again", "print('here')")
    for prune in (True, True, False):
        run = site.submit("again")
        assert site.wait_for(run)["state"] == "completed"
        assert text(site, run) == "here\n"
        until(lambda: engine.containers() == [])
        if prune:
            before = volumes(engine)
            engine.docker("volume", "prune", "-f", "--filter", GROUND)  # as documented
            assert before and not volumes(engine)
    assert volumes(engine)


def test_filling_leaves_no_volumes_behind(site: Site, engine: Engine) -> None:
    dockerfile = site.write("image/Dockerfile", f"FROM {PYTHON}\nVOLUME /data\n")
    engine.docker("build", "-q", "-t", "base/voluminous:1", str(dockerfile.parent))
    before = anonymous(engine)
    start(site)
    register(site, "volumes", "print('here')", "image='base/voluminous:1'")
    assert site.wait_for(site.submit("volumes"))["state"] == "completed"
    until(lambda: engine.containers() == [])
    assert anonymous(engine) == before and seeding(engine, "base/voluminous:1") == []


def test_what_a_killed_agent_was_filling_is_removed_by_the_next(site: Site, engine: Engine) -> None:
    dockerfile = site.write(
        "image/Dockerfile",
        f"FROM {PYTHON}\n"
        "RUN echo '#!/bin/sh' > /bin/slowly && echo 'sleep 60' >> /bin/slowly && chmod +x /bin/slowly\n",
    )
    engine.docker("build", "-q", "--network=none", "-t", "base/slow:1", str(dockerfile.parent))
    start(site)
    register(site, "slow", "pass", "image='base/slow:1', python='/bin/slowly'")
    run = site.submit("slow")
    (container,) = until(lambda: seeding(engine, "base/slow:1"))
    site.stop(site.agents[-1], signal.SIGKILL)
    assert seeding(engine, "base/slow:1") == [container]
    site.command("cancel", run)
    start(site)
    assert container not in seeding(engine, "base/slow:1")


def settings(site: Site, engine: Engine) -> Any:
    return load(environ={}, overrides={"home": site.home, "engine": engine.url})


async def test_an_agent_knows_its_containers_on_another_host(
    site: Site, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(label: str) -> str:
        return engine.docker("create", "--label", label, "--label", "flowagent.run=x", PYTHON, "true").strip()

    async def opened(directory: Path) -> str:
        (directory / "runs").mkdir(parents=True, exist_ok=True)
        runner = DockerRunner(settings(site, engine), directory)
        await runner.open()
        await runner.close()
        return (directory / "owner").read_text()

    mine, others = site.home / "agents/mine", site.home / "agents/others"
    owner = await opened(mine)
    assert await opened(others) != owner
    left, kept = made(f"flowagent.owner={owner}"), made("flowagent.owner=somebody")
    host = os.uname()
    renamed = os.uname_result((host.sysname, "another", *host[2:]))
    monkeypatch.setattr(os, "uname", lambda: renamed)
    assert await opened(mine) == owner
    found = {each["Id"] for each in json.loads(engine.docker("inspect", kept))}
    assert found == {kept}
    assert engine.docker("ps", "-aq", "--no-trunc", "--filter", f"id={left}") == ""
    engine.docker("rm", kept)
