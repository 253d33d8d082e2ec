"""Docker storage: images that are built, checked, pushed, and run."""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.containers import images
from tests.containers.conftest import start
from tests.containers.machinery import BARE, PYTHON, Engine, Registry
from tests.containers.test_runs import text
from tests.e2e.harness import Site, until
from tests.e2e.test_interpreters import interpreters, version_of

SCRIPT = """
import os
from flowagent import Flow, task
from flowagent.storage import Docker

dependencies = []
storage = Docker(
    base_image={base!r}, local_image=True, build_kwargs={{"network_mode": "none"}},
    python_dependencies=dependencies, {options}
)
assert dependencies == []

@task
def work():
    {body}

with Flow({name!r}, storage=storage) as flow:
    work()
"""


def script(
    site: Site, name: str, body: str = "print('in an image')", base: str = PYTHON, **options: Any
) -> Path:
    given = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return site.write(f"{name}.py", SCRIPT.format(name=name, body=body, base=base, options=given))


def storage_of(site: Site, name: str) -> dict[str, Any]:
    with closing(sqlite3.connect(site.home / "flowagent.db")) as database:
        rows = database.execute("SELECT spec FROM flow_version ORDER BY id").fetchall()
    return [dict(spec["storage"]) for (text,) in rows if (spec := json.loads(text))["name"] == name][-1]


@pytest.mark.parametrize("as_script", [False, True])
def test_an_image_that_stays_here(site: Site, engine: Engine, as_script: bool) -> None:
    (site.sources / "data.txt").write_text("carried along")
    file = script(
        site,
        "stays",
        "print(open('/data/data.txt').read(), os.environ['WHERE'], os.path.exists('/extra'))",
        stored_as_script=as_script,
        files={str(site.sources / "data.txt"): "/data/data.txt"},
        env_vars={"WHERE": '$HOME/it\'s "here"'},
        extra_dockerfile_commands=["RUN mkdir /extra"],
    )
    said = site.command("register", file)
    assert "stays on this machine's engine" in said.stderr and "Step 1/" in said.stderr
    assert ("warning" in said.stderr) == (sys.version_info[:2] != (3, 11))
    start(site)
    run = site.submit("stays")
    shown = site.wait_for(run)
    assert text(site, run) == 'carried along /it\'s "here" True\n', shown
    artifact = storage_of(site, "stays")["artifact"]
    assert artifact["image"].startswith("sha256:") and artifact["tag"].startswith("stays:20")
    assert shown["attempts"][0]["revision"] == artifact["image"]
    # nothing changed: nothing is built; a file that goes into it changed: it is
    if not as_script:
        assert "unchanged" in site.command("register", file).stdout
        (site.sources / "data.txt").write_text("something else")
        assert "changed" in site.command("register", file).stdout
        run = site.submit("stays")
        site.wait_for(run, "completed")
        assert text(site, run).startswith("something else")


def test_an_image_in_a_registry_is_run_by_its_digest(site: Site, engine: Engine, registry: Registry) -> None:
    login = registry.login(site.root / "login")
    file = script(site, "Größe 1", registry_url=registry.name, image_tag="one")
    said = site.command("register", file, env=login)
    assert f"pushed {registry.name}/groe-1:one" in said.stderr
    image = storage_of(site, "Größe 1")["artifact"]["image"]
    assert image.startswith(f"{registry.name}/groe-1@sha256:")
    for name in (image, f"{registry.name}/groe-1:one"):
        engine.docker("rmi", "-f", name)
    site.environment |= login
    start(site, "--registry-allow", registry.name)
    run = site.submit("Größe 1")
    shown = site.wait_for(run)
    assert text(site, run) == "in an image\n", shown
    assert "unchanged" in site.command("register", file).stdout


def test_registries_that_refuse_or_are_away(site: Site, engine: Engine, registry: Registry) -> None:
    file = script(site, "secretive", registry_url=registry.name)
    wrong = registry.login(site.root / "wrong", "hal-9000")
    refused = site.command("register", file, env=wrong, code=1)
    assert "cannot be pushed: the registry refuses" in refused.stderr and "docker login" in refused.stderr
    assert "hal-9000" not in refused.stderr
    right = registry.login(site.root / "right")
    site.command("register", file, env=right)
    image = storage_of(site, "secretive")["artifact"]
    start(site)
    for name in (image["image"], image["tag"]):
        engine.docker("rmi", "-f", name)
    shown = site.wait_for(site.submit("secretive"))
    assert shown["state"] == "crashed" and "cannot be pulled: the registry refuses" in shown["reason"], shown
    site.stop(site.agents[-1])
    site.environment |= right
    start(site)
    registry.stop()
    try:
        shown = site.wait_for(site.submit("secretive"))
        assert "cannot be pulled: the registry cannot be reached" in shown["reason"], shown
        away = site.command("register", script(site, "away", registry_url=registry.name), code=1)
        assert "cannot be pushed: the registry cannot be reached" in away.stderr
    finally:
        registry.start()
    run = site.submit("secretive")
    site.wait_for(run, "completed")


def test_builds_that_fail_say_how(site: Site) -> None:
    bad = script(site, "unsound", extra_dockerfile_commands=["RUN echo before-it-fails && exit 7"])
    said = site.command("register", bad, code=1).stderr
    assert "could not be built" in said and "before-it-fails" in said and "7" in said
    missing = script(site, "missing", files={"/no/such/file": "/x"})
    assert "/no/such/file does not exist" in site.command("register", missing, code=1).stderr
    none = script(site, "none", base="base/no-such-image:1")
    assert "could not be built" in site.command("register", none, code=1).stderr
    bare = script(site, "bare", base=BARE)
    assert "could not be built" in site.command("register", bare, code=1).stderr


def test_a_flow_that_does_not_load_in_the_image_is_not_registered(site: Site) -> None:
    helper = str(site.write("helper.py", "value = 1\n"))
    file = site.write(
        "needy.py",
        SCRIPT.format(
            name="needy", body="import helper", base=PYTHON, options="stored_as_script=True"
        ).replace("import os", "import os, helper"),
    )
    said = site.command("register", file, code=1).stderr
    assert "could not be built" in said and "No module named 'helper'" in said
    script_text = file.read_text().replace(
        "stored_as_script=True",
        f"stored_as_script=True, files={{{helper!r}: '/opt/flowagent/flows/helper.py'}}",
    )
    file.write_text(script_text)
    site.command("register", file)
    broken = script_text.replace("import os, helper", "import os, nowhere_to_be_found")
    assert "No module named" in site.command("register", site.write("needy.py", broken), code=1).stderr


def test_another_python_in_the_image_is_warned_of(site: Site, engine: Engine, tmp_path: Path) -> None:
    here = list(sys.version_info[:2])
    versions = {python: version_of(python)[:2] for python in interpreters()}
    another = next(python for python, version in versions.items() if version != here)
    images.with_another(tmp_path / "image.tar", Path(another))
    engine.docker("import", str(tmp_path / "image.tar"), "base/another:1")
    file = script(site, "elsewhere", base="base/another:1", stored_as_script=True)
    there, ours = (".".join(map(str, version)) for version in (versions[another], here))
    said = site.command("register", file).stderr
    assert f"has Python {there}, and the flow was registered by {ours}; a pickle may not load" in said


def test_a_dockerfile_of_ones_own(site: Site) -> None:
    site.write("image/Dockerfile", f"FROM {PYTHON}\nCOPY side.txt /srv/side.txt\nWORKDIR /srv\n")
    site.write("image/side.txt", "from the context")
    file = script(
        site,
        "own",
        "print(os.getcwd(), open('side.txt').read())",
        dockerfile=str(site.sources / "image/Dockerfile"),
    )
    file.write_text(file.read_text().replace(f"base_image={PYTHON!r}, ", ""))
    site.command("register", file)
    start(site)
    run = site.submit("own")
    shown = site.wait_for(run)
    assert text(site, run) == "/srv from the context\n", shown


def test_no_process_agent_takes_it(site: Site) -> None:
    site.command("register", script(site, "boxed"))
    site.start()
    run = site.submit("boxed")
    said = site.command("explain", run).stdout
    assert "runs process flows only; the run needs docker or kubernetes" in said
    local = (
        script(site, "both")
        .read_text()
        .replace("storage=storage)", "storage=storage, run_config=LocalRun())")
    )
    site.write("both.py", "from flowagent.run_configs import LocalRun\n" + local)
    refused = site.command("register", site.sources / "both.py", code=1).stderr
    assert "its run config is for runner process, and its storage for runner docker or kubernetes" in refused
    start(site)
    until(lambda: site.state(run) == "completed", 30)


def test_an_agent_of_named_registries_takes_no_other_image(site: Site, registry: Registry) -> None:
    site.command("register", script(site, "homemade"))
    start(site, "--registry-allow", registry.name)
    shown = site.wait_for(site.submit("homemade"))
    assert "is from no registry, and this agent allows only" in shown["reason"], shown
