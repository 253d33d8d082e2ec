"""An idle agent stays small: benchmarks/service.py in short. Its timings are read by people, not asserted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "service.py"
MOST = 50.0
"""MB of an idle agent, resident."""


def test_hours_of_polling_leave_no_trace() -> None:
    command = [sys.executable, BENCHMARK, "--rounds", "1", "--idle", "1", "--hours", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(.*\S) +([0-9.]+) (?:ms|x|%|MB|s) ", done.stdout, re.MULTILINE))
    for name in ("a day", "a day with health, scraped every 15 s"):
        begin, end = (float(rows[f"{name}: RSS {when}"]) for when in ("in the beginning", "at the end"))
        assert end <= MOST and end - begin < 5, done.stdout
    assert float(rows["a day with health, scraped every 15 s: renewals, of those of a day"]) > 10, done.stdout
