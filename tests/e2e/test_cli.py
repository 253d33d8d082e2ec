"""The command line as people and scripts use it: real processes on a home of their own."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

PYTHON_PATH = os.pathsep.join(str(Path(__file__).parents[2] / part) for part in ("agent", "backends"))
HOST = os.uname().nodename


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLOWAGENT_")}
    return {**kept, "PYTHONPATH": PYTHON_PATH, "FLOWAGENT_HOME": str(home), "NO_COLOR": "1", **more}


def cli(
    home: Path, *arguments: object, stdin: bytes = b"", cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. No command may ever show a traceback without being asked."""
    done = subprocess.run(
        [sys.executable, "-m", "flowagent", *map(str, arguments)],
        env=environment(home, **more),
        input=stdin,
        capture_output=True,
        timeout=60,
        cwd=cwd,
    )
    result = subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )
    assert "Traceback" not in result.stderr or "--debug" in arguments, result.stderr
    return result


def good(home: Path, *arguments: object, **more: Any) -> str:
    """The output of a command that succeeds."""
    done = cli(home, *arguments, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def data(home: Path, *arguments: object) -> Any:
    return json.loads(good(home, *arguments, "--json"))


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an empty store, to be copied: a store is created once for all tests."""
    directory = tmp_path_factory.mktemp("blank") / "home"
    good(directory, "runs")
    return directory


@pytest.fixture
def home(tmp_path: Path, blank: Path) -> Path:
    shutil.copytree(blank, tmp_path / "home", ignore=shutil.ignore_patterns("*.sock"))
    return tmp_path / "home"


FLOWS = """
import os, signal, sys, time
from flowagent import Flow, Parameter, get_logger, task
from flowagent.flows.function import flow
from flowagent.results import LocalResult

print("loading", __name__)

@task
def double(x):
    print("doubling", x)
    get_logger().info("doubled %s", x)
    return x * 2

with Flow("double", result=LocalResult(serializer="json")) as doubling:
    double(Parameter("x"))

@flow
def broken(text: str = "x"):
    print("before the end")
    raise ValueError("no such " + text)

@flow
def killed():
    print("before the kill", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

@flow
def slow(seconds: float = 60):
    print("started", flush=True)
    time.sleep(seconds)
    print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, blank: Path) -> Iterator[Path]:
    """A home with registered flows and an agent at work."""
    directory = tmp_path_factory.mktemp("busy")
    home = directory / "home"
    shutil.copytree(blank, home, ignore=shutil.ignore_patterns("*.sock"))
    (directory / "flows.py").write_text(FLOWS)
    good(home, "register", directory / "flows.py")
    with (directory / "agent.log").open("wb") as log:
        agent = subprocess.Popen(
            [sys.executable, "-m", "flowagent", "start", "--labels", "a,b", "--labels", "c", "--grace", "1s"],
            env=environment(home),
            stderr=log,
        )
    try:
        eventually(lambda: data(home, "agents"))
        yield home
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(20) == 0, (directory / "agent.log").read_text()
    finally:
        agent.kill()
        agent.wait()
    assert cli(home, "agents").stderr.startswith("no agent is known")  # it has said good-bye


def eventually(look: Callable[[], Any], seconds: float = 15.0) -> Any:
    """What ``look`` answers once it is true."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
    return seen


# -- the frame -----------------------------------------------------------------------------------------


def test_help_names_every_command_and_each_has_help(home: Path) -> None:
    from flowagent.cli.app import COMMANDS

    listed = good(home, "--help")
    for name, (_, line) in COMMANDS.items():
        assert f"  {name} " in listed and " ".join(line.split()[:4]) in listed
    for name in ("run", "cache", "secret"):
        assert "Usage: flowagent " + name in good(home, name, "--help")
    assert good(home, "--version") == "flowagent 0.1.0\n"


def test_slips_of_the_pen(home: Path, tmp_path: Path) -> None:
    done = cli(home, "strat")
    assert done.returncode == 2
    assert "There is no command 'strat'. Did you mean start" in done.stderr
    assert cli(home, "run", "x", "--wach").returncode == 2
    assert cli(home, "run").returncode == 2
    (tmp_path / "f.py").write_text(FLOWS)
    good(home, "register", tmp_path / "f.py")
    done = cli(home, "run", "duoble")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: no flow is registered as 'duoble'; did you mean 'double'?\n"
    run_id = data(home, "run", "double", "-p", "x=1")["id"]
    wrong = ("0" if run_id[3] != "0" else "1").join([run_id[:3], run_id[4:]])
    assert f"did you mean {run_id}?" in cli(home, "show", wrong).stderr
    assert f"'double' is a flow, not a run; its newest run is {run_id}" in cli(home, "logs", "double").stderr


def test_errors_of_settings_are_one_line(home: Path, tmp_path: Path) -> None:
    for arguments in (
        ["--store", "mysql://x", "runs"],
        ["runs", "--store", "http://x"],
        ["--config", tmp_path / "none.toml", "runs"],
        ["--home", "/proc/nothing", "flows"],
    ):
        done = cli(home, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    (tmp_path / "junk.db").write_bytes(b"junk" * 5000)
    done = cli(home, "--store", f"sqlite:///{tmp_path}/junk.db", "runs")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    done = cli(home, "run", "nothing", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and done.stderr.endswith("flowagent flows`\n")


def test_an_import_of_prefect_says_what_to_import(home: Path, tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("from prefect import Flow\n")
    done = cli(home, "register", tmp_path / "old.py")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "line 1: ModuleNotFoundError: No module named 'prefect'; import the same from flowagent\n"
    )


def test_a_store_that_somebody_named_is_not_made_on_the_way(home: Path, tmp_path: Path) -> None:
    for path in ("none/x.db", "x.db"):
        for command in (["flows"], ["run", "x"], ["agents"]):
            done = cli(home, "--store", f"sqlite:///{tmp_path}/{path}", *command)
            assert (done.returncode, done.stdout) == (1, "")
            assert f"there is no store at {tmp_path}/{path}; register a flow or start" in done.stderr
    assert not (tmp_path / "none").exists() and not (tmp_path / "x.db").exists()
    assert data(home, "flows") == [] and (home / "flowagent.db").exists()  # the one in the home is


def test_a_reader_that_leaves_early_is_no_error(home: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FLOWS)
    good(home, "register", tmp_path / "f.py")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "flowagent", "flows", "--json"],
        env=environment(home),
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert done.stderr == b""


def test_completion(home: Path, tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_FLOWAGENT_COMPLETE" in good(home, "completion", shell)
    assert cli(home, "completion", SHELL="/bin/tcsh").returncode == 2
    (tmp_path / "f.py").write_text(FLOWS)
    good(home, "register", tmp_path / "f.py")

    def completed(words: str) -> set[str]:
        position = str(len(words.split(" ")) - 1)
        shown = good(home, _FLOWAGENT_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=position)
        return {line.partition(",")[2] for line in shown.splitlines()}

    assert completed("flowagent re") == {"register", "result", "retry"}
    assert completed("flowagent run d") == {"double"}
    assert completed("flowagent run k") == {"killed"}


def test_start_up_is_quick(home: Path) -> None:
    """Printed, not asserted: the figures are those of benchmarks/."""
    for arguments in (["--help"], ["runs"], ["flows"], ["start", "--help"], ["cache", "ls"]):
        times = []
        for _ in range(2):
            begun = time.perf_counter()
            good(home, *arguments)
            times.append(time.perf_counter() - begun)
        print(f"flowagent {' '.join(arguments)}: {min(times) * 1000:.0f} ms")


# what no command that ends at once may import: each costs more than the command's own work
HEAVY = {
    "alembic", "anyio._backends", "asyncio", "cloudpickle", "email", "flowagent.daemon.agent", "http",
    "importlib.metadata", "logging", "psycopg", "rich", "sqlalchemy", "ssl", "structlog",
}  # fmt: skip
NO_STORE = {"flowagent.models", "flowagent.settings", "flowagent.store", "pathlib", "sqlite3"}


def imported(home: Path, *arguments: str) -> set[str]:
    """The modules that a command has imported at its end; its output is no terminal."""
    code = (
        "import sys; from flowagent.cli.app import run; "
        "code = run(sys.argv[1:]); print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(home), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_commands_import_only_what_they_need(home: Path, tmp_path: Path) -> None:
    (tmp_path / "flows.py").write_text(FLOWS)
    good(home, "register", tmp_path / "flows.py")
    run = good(home, "run", "broken").strip()
    for command in (["--help"], ["--version"], ["show", "--help"], ["completion", "bash"]):
        assert not (HEAVY | NO_STORE) & imported(home, *command), command
    for command in (
        ["runs"], ["flows"], ["agents"], ["show", run], ["show", run, "--json"], ["logs", run],
        ["explain", run], ["run", "double", "-p", "x=1"], ["cancel", run], ["retry", run],
        ["secret", "ls"], ["cache", "ls"], ["cache", "prune"], ["cache", "verify"],
    ):  # fmt: skip
        assert not HEAVY & imported(home, *command), command


# -- register --------------------------------------------------------------------------------------------


def test_register_reports_each_flow_and_what_changed(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "flows.py"
    file.write_text(FLOWS)
    first = good(home, "register", file, "--label", "x,y", "--project", "p")
    assert len(first.splitlines()) == 4
    assert first.startswith(f"registered double version 1 (labels: {HOST}, x, y): new")
    again = data(home, "register", file, "--label", "x,y", "--project", "p")
    assert [item["created"] for item in again["registered"]] == [False] * 4
    assert again["errors"] == []
    assert set(again["registered"][0]) >= {
        "flow",
        "version",
        "version_id",
        "created",
        "labels",
        "source",
        "summary",
    }
    changed = good(home, "register", f"{file}:slow", "--label", "x")
    assert changed.startswith("registered slow version 2") and "changed project, labels" in changed
    listed = {item["name"]: item for item in data(home, "flows")}
    assert listed["slow"]["version"] == 2 and listed["double"]["project"] == "p"
    assert "double" in good(home, "flows") and "x*" in good(home, "flows")


def test_one_bad_file_does_not_keep_the_others_out(home: Path, tmp_path: Path) -> None:
    flow = (
        "from flowagent.flows.function import flow\nimport helper\n@flow(name=helper.NAME)\ndef f(): pass\n"
    )
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "flow.py").write_text(flow)
        (tmp_path / name / "helper.py").write_text(f"NAME = {name!r}  # for flowagent\n")
    bad = {
        "a_exit.py": "import flowagent, sys\nsys.exit(3)\n",
        "b_gone.py": "import flowagent, os\nos._exit(5)\n",
        "c_name.py": "import flowagent\n\nprint(undefined)\n",
        "d_syntax.py": "import flowagent\ndef (\n",
        "e_none.txt": "flowagent",
        "f_other.py": "raise SystemError\n",
        "g_same.py": "from flowagent.flows.function import flow\n@flow(name='one')\ndef g(): pass\n",
        "h_last.py": "from flowagent.flows.function import flow\n@flow\ndef last(): pass\n",
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
    environment = tmp_path / "venv"
    environment.mkdir()
    (environment / "pyvenv.cfg").touch()
    (environment / "x.py").write_text("import flowagent; raise SystemError")
    done = cli(home, "register", tmp_path, "--json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    errors = {Path(item["source"]).name: item["error"] for item in answer["errors"]}
    assert set(errors) == {"a_exit.py", "b_gone.py", "c_name.py", "d_syntax.py", "flow.py"}
    assert "called sys.exit(3) while it was being loaded" in errors["a_exit.py"]
    assert "exit code 5" in errors["b_gone.py"]
    assert "line 3: NameError: name 'undefined' is not defined" in errors["c_name.py"]
    assert "line 2: SyntaxError" in errors["d_syntax.py"]
    # g_same.py came first, so the file that holds the same name is refused; each saw its own helper.py
    assert "a flow named 'one' was registered from" in errors["flow.py"]
    assert {item["flow"] for item in answer["registered"]} == {"one", "two", "last"}
    assert len(done.stderr.splitlines()) == 5, "one line for each"


def test_register_globs_modules_and_what_is_not_there(home: Path, tmp_path: Path) -> None:
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "flows.py").write_text(FLOWS)
    shown = good(home, "register", "-m", "shop.flows:slow", cwd=tmp_path)
    assert shown.startswith("registered slow version 1 (no labels): new")
    assert data(home, "flows")[0]["storage"]["module"] == "shop.flows:slow"
    assert len(good(home, "register", f"{tmp_path}/**/fl*.py").splitlines()) == 4
    for arguments, code in (
        ([], 2),
        (["none.py"], 2),
        (["*.none"], 2),
        (["-m", "no.such.module"], 1),
        ([f"{package}/flows.py:nothing"], 1),
        ([package / "__init__.py"], 1),
    ):
        done = cli(home, "register", *arguments, cwd=tmp_path)
        assert done.returncode == code, done
        assert done.stderr.splitlines()[-1].startswith("Error: ")


def test_a_script_registers_itself(home: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from flowagent import Flow, task\n@task\ndef t(): pass\n"
        "with Flow('itself') as f:\n    t()\nf.register(project_name='p')\n"
    )
    done = subprocess.run([sys.executable, script], env=environment(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "registered itself version 1" in done.stdout + done.stderr
    assert data(home, "flows")[0]["name"] == "itself"


# -- run, without an agent ---------------------------------------------------------------------------------


def test_parameters_are_checked_before_anything_is_queued(home: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FLOWS)
    good(home, "register", tmp_path / "f.py")
    for arguments, said in (
        (["double"], "flow 'double' needs a value for x"),
        (["double", "-p", "x=1", "-p", "y=2"], "flow 'double' has no parameter 'y'; it takes x"),
        (["killed", "-p", "x=1"], "it takes none"),
        (["killed", "--label", "a b"], "white space"),
    ):
        done = cli(home, "run", *arguments)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "list.json").write_text("[]")
    for arguments in (
        ["-p", "x"],
        ["--at", "noon"],
        ["--param-file", tmp_path / "none.json"],
        ["--param-file", tmp_path / "list.json"],
        ["--env", "A"],
        ["--retries", "-1"],
    ):
        assert cli(home, "run", "double", *arguments).returncode == 2, arguments
    assert data(home, "runs") == []


def test_a_run_takes_what_it_was_given(home: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FLOWS)
    good(home, "register", f"{tmp_path}/f.py:double", "--label", "x")
    (tmp_path / "p.json").write_text('{"x": {"from": "file"}}')
    options = ["--label", "y", "--env", "A=b=c", "--at", "+1h", "--retries", "2", "--idempotency-key", "k"]
    run = data(home, "run", "double", "--param-file", tmp_path / "p.json", *options)
    assert run["parameters"] == {"x": {"from": "file"}}
    assert run["labels"] == sorted([HOST, "x", "y"])
    assert run["env"] == {"A": "b=c"} and run["retries_left"] == 2 and run["state"] == "scheduled"
    assert run["due"] == pytest.approx(time.time() + 3600, abs=30)
    done = cli(home, "run", "double", "-p", "x=1", "--idempotency-key", "k")
    assert done.stdout == run["id"] + "\n" and "was used before" in done.stderr
    text = data(home, "run", "double", "--param-file", tmp_path / "p.json", "-p", "x=hello")
    assert text["parameters"] == {"x": "hello"}


def test_nobody_to_take_it_is_said_at_once(home: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FLOWS)
    good(home, "register", tmp_path / "f.py")
    done = cli(home, "run", "slow", "--label", "gpu")
    run_id = done.stdout.strip()
    assert done.returncode == 0
    assert (
        f"run {run_id} waits: no agent is running; start one with: flowagent start --labels gpu\n"
        in done.stderr
    )
    explained = cli(home, "explain", run_id[:6])
    assert "scheduled, due since" in explained.stdout and "no agent is known" in explained.stderr
    assert data(home, "explain", run_id)["agents"] == []
    assert "is cancelled" in good(home, "cancel", run_id, "--reason", "not needed")
    assert data(home, "show", run_id)["run"]["reason"] == "not needed"
    done = cli(home, "cancel", run_id)
    assert done.returncode == 1 and "has ended already" in done.stderr
    assert "it has no output yet" in cli(home, "logs", run_id).stderr


# -- with an agent -----------------------------------------------------------------------------------------


def test_a_run_that_completes(busy: Path) -> None:
    done = cli(busy, "run", "double", "-p", "x=21", "--watch")
    assert done.returncode == 0, done.stderr
    assert "doubling 21\n" in done.stdout and "INFO    double-1: doubled 21" in done.stdout
    run_id = done.stderr.splitlines()[0]
    assert "double completed" in done.stderr
    shown = data(busy, "show", run_id)
    assert shown["run"]["state"] == "completed" and shown["last_lines"] == []
    (task,) = [task for task in shown["tasks"] if task["task"] == "double-1"]
    assert task["state"] == "completed" and Path(task["result"]["path"]).read_text() == "42"
    assert shown["attempts"][0]["exit_code"] == 0 and shown["attempts"][0]["peak_memory"] > 1 << 20
    for expected in ("state:", "completed", "peak memory:", "revision:", "sha256:", task["result"]["path"]):
        assert expected in good(busy, "show", run_id[:8])
    lines = [json.loads(line) for line in good(busy, "logs", run_id, "--json").splitlines()]
    assert {line["event"] for line in lines} >= {"text", "log", "task"}
    assert b"\x1e" in good(busy, "logs", run_id, "--raw").encode()
    assert good(busy, "logs", "-f", run_id) == good(busy, "logs", run_id, "--attempt", "1")
    assert "has no attempt 2" in cli(busy, "logs", run_id, "--attempt", "2").stderr


def test_exit_codes_and_reasons_of_runs_that_do_not(busy: Path) -> None:
    failed = cli(busy, "run", "broken", "-w", "--retries", "1")
    assert (
        failed.returncode == 1
        and "broken failed" in failed.stderr
        and "ValueError: no such x" in failed.stderr
    )
    assert failed.stdout.count("before the end") == 2 and "-- attempt 2 --" in failed.stdout
    killed = cli(busy, "run", "killed", "-w")
    assert killed.returncode == 3 and "killed crashed" in killed.stderr and "SIGKILL" in killed.stderr
    shown = good(busy, "show", killed.stderr.splitlines()[0])
    assert "Last lines of output:" in shown and "  before the kill" in shown and "signal:" in shown
    states = {
        run["flow_name"]: run["state"]
        for run in data(busy, "runs", "--state", "failed", "--state", "crashed")
    }
    assert states == {"broken": "failed", "killed": "crashed"}
    again = cli(busy, "retry", killed.stderr.splitlines()[0], "-w")
    assert again.returncode == 3
    assert (
        data(busy, "show", again.stderr.splitlines()[0])["run"]["retry_of"] == killed.stderr.splitlines()[0]
    )
    assert cli(busy, "runs", "--flow", "brokn").returncode == 1
    assert "broken" in good(busy, "runs", "--flow", "broken", "--limit", "1")


def watching(home: Path, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Start ``run --watch`` of the slow flow, and wait until it has begun; its run."""
    watch = subprocess.Popen(
        [sys.executable, "-m", "flowagent", "run", "slow", "--watch", *arguments],
        env=environment(home, PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watch.stdout is not None and watch.stderr is not None
    run_id = watch.stderr.readline().strip()
    while "started" not in watch.stdout.readline():
        assert watch.poll() is None
    return watch, run_id


def test_cancel_while_it_is_watched(busy: Path) -> None:
    watch, run_id = watching(busy)
    refused = cli(busy, "retry", run_id)
    assert refused.returncode == 1 and "only a run that has ended can be repeated" in refused.stderr
    assert "is executed by agent" in good(busy, "explain", run_id)
    assert "cancelling" in good(busy, "cancel", run_id)
    output, errors = watch.communicate(timeout=20)
    assert watch.returncode == 4 and "slow cancelled" in errors
    assert "ended" not in output
    assert good(busy, "explain", run_id).startswith(f"run {run_id} of slow: cancelled")


def test_ctrl_c_ends_the_watching_and_not_the_run(busy: Path) -> None:
    watch, run_id = watching(busy, "-p", "seconds=1.5")
    watch.send_signal(signal.SIGINT)
    _, errors = watch.communicate(timeout=10)
    assert watch.returncode == 130
    assert f"the run goes on: see it with flowagent logs -f {run_id}" in errors and "Traceback" not in errors
    assert good(busy, "logs", "-f", run_id).endswith("ended\n")
    assert data(busy, "show", run_id)["run"]["state"] == "completed"


def test_json_of_a_watched_run_is_a_stream(busy: Path) -> None:
    lines = [
        json.loads(line) for line in good(busy, "run", "double", "-p", "x=1", "-w", "--json").splitlines()
    ]
    states = [line["run"]["state"] for line in lines if line["event"] == "run"]
    assert states[0] == "scheduled" and states[-1] == "completed"
    assert any(line["event"] == "log" and line["message"] == "doubled 1" for line in lines)


def test_agents_and_why_they_match(busy: Path) -> None:
    (agent,) = data(busy, "agents")
    assert agent["labels"] == sorted([HOST, "a", "b", "c"]) and agent["state"] == "live"
    assert "a, b, c" in good(busy, "agents")
    done = cli(busy, "run", "double", "-p", "x=1", "--label", "gpu")
    assert f"no live agent can take it: {agent['name']} lacks label gpu" in done.stderr
    explained = data(busy, "explain", done.stdout.strip())
    assert explained["agents"][0]["matches"] is False and "lacks label gpu" in explained["verdict"]
    later = data(busy, "run", "double", "-p", "x=1", "--at", "+1h")
    assert "due in 59 min" in good(busy, "explain", later["id"]) and "yes" in good(
        busy, "explain", later["id"]
    )
    for run_id in (later["id"], done.stdout.strip()):
        good(busy, "cancel", run_id)


def test_a_terminal_is_told_in_colour_and_never_steered(busy: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(
        "from flowagent.flows.function import flow\n@flow\ndef evil():\n    print('\\x1b]0;owned\\x07')\n"
    )
    good(busy, "register", tmp_path / "evil.py")
    run_id = data(busy, "run", "evil")["id"]
    good(busy, "logs", "-f", run_id)
    leader, follower = pty.openpty()
    environ = {**environment(busy), "TERM": "xterm", "COLUMNS": "200"}
    del environ["NO_COLOR"]
    for command in (["logs", run_id], ["runs"]):
        subprocess.run(
            [sys.executable, "-m", "flowagent", *command], env=environ, stdout=follower, check=True
        )
    os.close(follower)
    shown = b""
    try:
        while piece := os.read(leader, 65536):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert b"^[]0;owned^G" in shown and b"\x1b]" not in shown
    assert b"\x1b[32mcompleted" in shown and run_id.encode() in shown


# -- agents from the command line ----------------------------------------------------------------------------


def test_start_once_executes_what_is_due(home: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FLOWS)
    good(home, "register", tmp_path / "f.py")
    run_ids = [data(home, "run", "double", "-p", f"x={x}")["id"] for x in range(3)]
    done = cli(home, "start", "--once", "--log-format", "json", "--name", "once", "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["agent"] for line in done.stderr.splitlines()} == {"once"}
    assert {data(home, "show", run_id)["run"]["state"] for run_id in run_ids} == {"completed"}


def test_an_unreachable_store_is_said_soon_and_tried_again(home: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    agent = subprocess.Popen(
        [sys.executable, "-m", "flowagent", "--store", "postgresql://nobody@127.0.0.1:1/none", "start"],
        env=environment(home),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert agent.stderr is not None
    try:
        lines = [agent.stderr.readline(), agent.stderr.readline()]
        assert time.monotonic() - begun < 4
        assert all("the store is away" in line for line in lines), lines
        agent.terminate()
        assert agent.wait(10) == 0
        assert "Traceback" not in agent.stderr.read()
    finally:
        agent.kill()
        agent.wait()
        agent.stderr.close()


def test_wrong_agents_do_not_start(home: Path) -> None:
    for arguments, code in (
        (["--limit", "0"], 2),
        (["--lease", "x"], 2),
        (["--labels", "a b"], 2),
        (["--name", "/"], 2),
        (["--max", "memory=foo"], 2),
    ):
        done = cli(home, "start", *arguments)
        assert done.returncode == code, done.stderr
        assert done.stderr.splitlines()[-1].startswith("Error: ")
    said = "Error: option max: memory takes a number of bytes above 0, such as 512M or 2G; got 'foo'\n"
    assert done.stderr == said


# -- this machine --------------------------------------------------------------------------------------


def test_secrets_come_from_standard_input_and_stay_hidden(home: Path) -> None:
    value = b"p\xc3\xa4ss word$\n\n"
    done = cli(home, "secret", "set", "API_KEY", stdin=value)
    assert done.returncode == 0 and "ss word" not in done.stdout + done.stderr
    assert (home / "secrets" / "API_KEY").read_bytes() == value
    assert (home / "secrets" / "API_KEY").stat().st_mode & 0o777 == 0o600
    assert "ends with a line feed" in cli(home, "secret", "set", "OTHER", stdin=b"x\n").stderr
    assert data(home, "secret", "ls") == [
        {"name": "API_KEY", "from": "file"},
        {"name": "OTHER", "from": "file"},
    ]
    good(home, "secret", "rm", "OTHER")
    assert "OTHER" not in good(home, "secret", "ls")
    for arguments, stdin in (
        (["set", "../x"], b"v"),
        (["set", "E"], b""),
        (["set", "B"], b"\xff"),
        (["rm", "N"], b""),
    ):
        assert cli(home, "secret", *arguments, stdin=stdin).returncode == 1, arguments
    assert cli(home, "secret", "set", "NAME", "value", stdin=b"").returncode == 2


def test_the_source_cache(home: Path, tmp_path: Path) -> None:
    assert data(home, "cache", "ls") == {"sources": [], "mirrors": []}
    (tmp_path / "f.py").write_text(
        "from flowagent import Flow, task\nfrom flowagent.storage import Local\n@task\ndef t(): pass\n"
        "with Flow('pickled', storage=Local()) as f:\n    t()\n"
    )
    good(home, "register", tmp_path / "f.py")
    good(home, "run", "pickled")
    good(home, "start", "--once")
    (entry,) = data(home, "cache", "ls")["sources"]
    assert entry["backend"] == "Local" and entry["bytes"] > 0 and not entry["in_use"]
    assert entry["key"][:12] in good(home, "cache", "ls")
    assert "as they were published" in good(home, "cache", "verify")
    file = next((home / "sources" / entry["key"] / "source").iterdir())
    file.chmod(0o600)
    file.write_bytes(b"changed")
    assert cli(home, "cache", "verify").returncode == 1
    good(home, "run", "pickled")
    good(home, "start", "--once")
    assert good(home, "cache", "prune", "--max-age", "1h").startswith("removed 0 sources")
    assert good(home, "cache", "prune", "--max-size", "0").startswith("removed 1 source,")
    assert data(home, "cache", "ls") == {"sources": [], "mirrors": []}


def test_doctor(home: Path) -> None:
    findings = {finding["check"]: finding for finding in data(home, "doctor")}
    checks = (
        "python home disk store clock launcher sandbox limits landlock bubblewrap git ssh docker kubernetes"
    )
    assert " ".join(findings) == checks
    assert {findings[check]["level"] for check in ("python", "home", "store", "clock", "launcher")} == {"ok"}
    done = cli(home, "--store", "sqlite:////proc/nothing.db", "doctor")
    assert done.returncode == 1 and "failed  store" in done.stdout
    done = cli(home, "--store", f"sqlite:///{home}/none/x.db", "doctor")
    assert f"there is no store at {home}/none/x.db" in done.stdout and not (home / "none").exists()


def test_demo(tmp_path: Path) -> None:
    done = cli(tmp_path / "mine", "demo", "--who", "you", FLOWAGENT_LABELS="x", FLOWAGENT_REQUIRE_LABELS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'the result is "Hello, you!", kept in ' in done.stdout
    assert "greeting.txt has" in done.stdout and "INFO    greet-1: greeting you" in done.stdout
    assert not (tmp_path / "mine").exists()
    assert not Path(done.stdout.partition("its log is ")[2].partition(")")[0]).parent.exists()
    left = [
        p for p in psutil.process_iter(["cmdline"]) if "flowagent-demo-" in " ".join(p.info["cmdline"] or ())
    ]
    assert left == []


def test_demo_in_a_home_that_stays(tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = cli(tmp_path / "other", "demo", "--home", home)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = Path(done.stdout.partition("kept in ")[2].splitlines()[0])
    assert kept.is_relative_to(home) and json.loads(kept.read_text()) == "Hello, world!"
    assert [run["state"] for run in data(home, "runs")] == ["completed"]


def test_demo_says_when_its_agent_cannot_start(tmp_path: Path, home: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-m", "flowagent", "start", "--name", "demo"],
        env=environment(home),
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: data(home, "agents"))
        done = cli(home, "demo", "--home", home)
        assert done.returncode == 1
        assert (
            "Error: the agent has ended with exit code 1: Error: an agent named demo is running"
            in done.stderr
        )
    finally:
        other.terminate()
        assert other.wait(20) == 0
