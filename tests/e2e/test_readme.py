"""The examples of README.md and docs/ do what they say.

Two kinds of code blocks are examples: one whose first line is ``# file: NAME`` is written to that file, and
the commands of a ``console`` block are typed into one shell per document, in order. Each must succeed, and
print what stands below it, if anything does: ``...`` stands for any text within a line, alone for any lines,
and white space counts once. Blocks of other kinds (``sh``, ``text``) are for reading.
"""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from tests.e2e.harness import processes_of

from flowagent.settings import Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# file: (\S+)\n")
MARK = "-- the command has ended with "


@dataclass
class Command:
    """A line typed, and what is to be printed then."""

    text: str
    expected: list[str] = field(default_factory=list)


def examples(text: str) -> Iterator[tuple[str, str] | Command]:
    """Files as (name, content), and commands, in the order of the document."""
    for kind, body in BLOCK.findall(text):
        named = FILE.match(body)
        if named:
            yield named[1], body[named.end() :]
        elif kind == "console":
            yield from commands(body)


def commands(body: str) -> list[Command]:
    found: list[Command] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:]))
        elif found and found[-1].text.endswith("\\"):
            found[-1].text += "\n" + line
        else:
            found[-1].expected.append(line)
    return found


def agrees(expected: list[str], printed: str) -> bool:
    """Whether the output is what the document shows."""
    pattern = ""
    for line in expected:
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pieces = [re.escape(" ".join(piece.split())) for piece in re.sub(r"\s+", " ", line).split("...")]
            pattern += r"[^\n]*".join(pieces) + r"\n"
    lines = "".join(" ".join(line.split()) + "\n" for line in printed.splitlines())
    return re.fullmatch(pattern, lines) is not None


def test_the_comparison_can_fail() -> None:
    assert agrees(["run ... is", "...", "end"], "run 17  is\nx\ny\nend\n")
    assert agrees(["a", "...", "b"], "a\nb\n")
    assert not agrees(["run ... is"], "run 17 was\n")
    assert not agrees(["a"], "a\nb\n")
    assert not agrees(["a", "...", "b"], "a\nc\n")


@dataclass
class Machine:
    """A home, an environment in which flowagent is installed, and a shell."""

    root: Path

    def __post_init__(self) -> None:
        self.home, self.work, self.python = self.root / "home", self.root / "work", self.root / "venv"
        self.home.mkdir()
        self.work.mkdir()
        venv.create(self.python, with_pip=False)
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        (self.python / "lib" / version / "site-packages" / "development.pth").write_text(
            "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
        )
        self.program("flowagent", '"$@"')
        self.program("pip", '"$@" --no-index --no-build-isolation')  # with what is here already
        self.shell = subprocess.Popen(
            ["bash", "-u"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.work,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("FLOWAGENT_")},
                "HOME": str(self.home),
                "PYTHONUNBUFFERED": "1",  # lines in the order in which a terminal shows them
                "PATH": f"{self.python}/bin:{os.environ['PATH']}",
                "TMPDIR": str(self.root),
            },
        )

    def program(self, module: str, arguments: str) -> None:
        path = self.python / "bin" / module
        path.write_text(f"#!/bin/sh\nexec {self.python}/bin/python -m {module} {arguments}\n")
        path.chmod(0o755)

    def write(self, name: str, content: str) -> None:
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def type(self, command: Command) -> tuple[str, int]:
        """What the command prints, and its exit code."""
        assert self.shell.stdin is not None and self.shell.stdout is not None
        self.shell.stdin.write(f"{command.text}\nprintf '\\n{MARK}%s\\n' $?\n")
        self.shell.stdin.flush()
        printed = ""
        for line in self.shell.stdout:
            if line.startswith(MARK):
                return printed.removesuffix("\n"), int(line.removeprefix(MARK))
            printed += line
        raise AssertionError(f"the shell ended at {command.text!r}: {printed}")

    def close(self) -> None:
        self.shell.kill()
        for pid in processes_of(self.home):
            os.kill(pid, 9)
        self.shell.communicate()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_examples_do_what_they_say(document: Path, machine: Machine) -> None:
    for example in examples(document.read_text()):
        if isinstance(example, tuple):
            machine.write(*example)
            continue
        printed, code = machine.type(example)
        assert code == 0, f"{example.text}: exit code {code}\n{printed}"
        assert not example.expected or agrees(example.expected, printed), (
            f"{example.text} printed\n{printed}\nand not\n" + "\n".join(example.expected)
        )


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    for setting in fields(Settings):
        if setting.name in ("config", "origins"):  # where the others came from
            continue
        assert f"`FLOWAGENT_{setting.name.upper()}`" in text


def test_links_between_the_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"
