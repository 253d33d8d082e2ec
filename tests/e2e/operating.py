"""Questions to an agent at its health address, and flows to ask about."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.harness import Site, until

SLEEPER = """
    import pathlib, time
    from flowagent import flow

    @flow
    def sleeper(flag: str = "", started: str = ""):
        print("up", flush=True)
        if started:
            pathlib.Path(started).touch()
        while flag and not pathlib.Path(flag).exists():
            time.sleep(0.02)
        return 1
"""
FAILING = """
    from flowagent import flow

    @flow
    def failing():
        raise ValueError("no")
"""


def health_of(site: Site, agent: subprocess.Popen[bytes]) -> str:
    """Where the agent serves, from its log."""

    def said() -> str | None:
        for line in site.log(agent).splitlines():
            if "health and metrics are served" in line:
                return str(json.loads(line)["address"])
        return None

    return f"http://{until(said)}"


def get(url: str, accept: str = "*/*") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Accept": accept}), timeout=20
        ) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """Samples by name and the values of their labels."""
    code, text = get(f"{url}/metrics")
    assert code == 200, text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def status(url: str) -> dict[str, Any]:
    return dict(json.loads(get(f"{url}/status.json")[1]))


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path
