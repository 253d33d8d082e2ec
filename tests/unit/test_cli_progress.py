"""Progress bars on a real terminal, and their absence elsewhere."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios

SHOWN = """
import time
from flowagent.cli import progress
progress.say("fetching\\x1b[2J it")
with progress.bar("downloading \\x1b]0;title\\x07 [bold]flows/etl.py", 2_000_000) as advance:
    for _ in range(4):
        advance(1_000_000)
        advance(-500_000)  # some of it is done again
        time.sleep(0.15)
    time.sleep(0.15)
print("after it")
"""


def on_a_terminal(code: str) -> tuple[str, str]:
    """What a command writes to the terminal that is its standard error, and to its standard output."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    environ = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**environ, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 1 << 16):
            seen += piece
    except OSError:  # so a terminal says that nobody has it open any more
        pass
    finally:
        os.close(ours)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, seen
    return seen.decode(), out.decode()


def test_a_bar_on_a_terminal() -> None:
    seen, out = on_a_terminal(SHOWN)
    assert out == "after it\n"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "fetching^[[2J it" in plain
    assert "downloading ^[]0;title^G [bold]flows/etl.py" in plain  # nothing in it steers the terminal
    assert re.findall(r"(\d\.\d)/2\.0 MB", plain)[-1] == "2.0"
    assert "MB/s" in plain
    # when it is done, the cursor is shown again, and the line is empty
    _, hidden, after = seen.rpartition("\x1b[?25h")
    assert hidden and after.endswith("\x1b[2K")


def test_no_bar_elsewhere() -> None:
    done = subprocess.run([sys.executable, "-c", SHOWN], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("after it\n", "fetching^[[2J it\n")
