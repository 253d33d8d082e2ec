"""The table of probes in docs/security.md."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "security.md"
BEGIN, END = "<!-- table of probes -->\n", "<!-- end of the table -->\n"


def made() -> str:
    """The table as the probes declare it."""
    from tests.security.probes import IDENTITIES, LEVELS, PROBES

    lines = [
        "| what a flow tries | process | landlock | namespace | why it is not blocked |",
        "|---|---|---|---|---|",
    ]
    for each in sorted(PROBES, key=lambda each: each.key):
        cells = []
        for level in LEVELS:
            verdicts = {identity: each.verdict(identity, level) for identity in IDENTITIES}
            if len(set(verdicts.values())) == 1:
                cells.append(verdicts["user"])
            else:
                names = {"user": "user", "root": "root", "run_as": "run-as"}
                cells.append(", ".join(f"{names[who]}: {what}" for who, what in verdicts.items()))
        lines.append(f"| {each.group}: {each.title} | {' | '.join(cells)} | {each.why} |")
    return "\n".join(lines) + "\n"


def current() -> str:
    """The table as the document has it."""
    return DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]


def write() -> None:
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + made() + END + rest.partition(END)[2])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for module in sorted((Path(__file__).parent / "probes").glob("[a-z]*.py")):
        importlib.import_module(f"tests.security.probes.{module.stem}")
    if "--write" in sys.argv:
        write()
    else:
        print(made(), end="")
