"""The command line: one module per command group, each imported when its command is asked for."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """The console entry point: run the command that ``sys.argv`` names, and exit with its code."""
    from flowagent.cli.app import run

    code = run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has gone; what is left of it must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
