"""A source cache outside of the home: used by runs, and as closed to them as the home is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.e2e.harness import Site

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
