"""``python -m flowagent``: the command line."""

from __future__ import annotations

from flowagent.cli import main

if __name__ == "__main__":
    main()
