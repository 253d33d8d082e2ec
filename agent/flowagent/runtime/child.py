"""The flow process: from the fork to the flow's outcome."""

from __future__ import annotations

import atexit
import gc
import io
import json
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NoReturn

from flowagent.flows.context import RunContext, context
from flowagent.flows.errors import FlowError, Stop
from flowagent.flows.logs import get_logger
from flowagent.flows.observer import Observer, Restored
from flowagent.flows.results import LOCATION_NAMES, format_location, result_from_json, serializer_named
from flowagent.runtime import bubblewrap, bytecode, linux, loader, relay, sandbox
from flowagent.runtime.events import Emitter
from flowagent.runtime.limits import Limits
from flowagent.runtime.rundir import RunDirectory
from flowagent.runtime.warmth import renew

STDIO = 3
"""Descriptors below this are standard input, output and error."""
MAX_PACKET = 1 << 16
MAX_REASON = 4000
"""Characters of a reason that are kept."""

_inherited: dict[str, str] = {}
"""The environment that flow processes are forked with."""
_streams: list[io.TextIOWrapper] = []


class Stopped(Stop):
    """SIGTERM arrived: unwind, so that the flow's own ``finally`` blocks run within the grace."""


def stand_by(
    connection: socket.socket, prepared: sandbox.Sandbox, parent: int, *, rehearses: bool = True
) -> NoReturn:
    """Become a flow process: get ready, wait for an attempt, confine, load, execute, report, end."""

    def work() -> int:
        _detach(parent)
        renew()
        if rehearses:
            rehearse()
        prepared.make_ready()
        packet, fds, _, _ = socket.recv_fds(connection, MAX_PACKET, 3)
        if not packet:
            return 0  # not needed any more
        job = json.loads(packet)
        return _run(RunDirectory(job["directory"]), prepared, Limits(*job["limits"]), fds)

    _end_with(work)


def run_inside(arguments: Sequence[str]) -> NoReturn:
    """The same inside of bubblewrap, where the flow process is an interpreter that has just started."""

    def work() -> int:
        spec_fd, outcome, secrets, rules = arguments
        with open(int(spec_fd), "rb") as file:
            spec = json.load(file)
        prepare()
        # Mounts are bubblewrap's here, and the user and the limits are those that it was started with.
        rest = sandbox.Rules.from_json(rules)._replace(user=None, cgroups=())
        prepared = sandbox.Sandbox(rest, isolates=False)
        prepared.make_ready()
        values = None if secrets == "none" else int(secrets)
        return _run_flow(RunDirectory(spec["run_directory"]), prepared, Limits(), spec, int(outcome), values)

    _end_with(work)


def _end_with(work: Callable[[], int]) -> NoReturn:
    """End this process with the exit code of its work."""
    code = 70
    try:
        code = work()
    except Stopped:
        code = 128 + signal.SIGTERM
    except BaseException:
        # Before and after user code there is only ours: whoever reads the output has to see it.
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(directory: RunDirectory, prepared: sandbox.Sandbox, limit: Limits, fds: Sequence[int]) -> int:
    output, outcome = fds[:2]
    secrets = fds[2] if len(fds) > 2 else None
    os.dup2(output, 1)
    os.dup2(output, 2)
    linux.unblock_signals()
    spec = directory.read_spec()
    if spec["sandbox"] == sandbox.NAMESPACE:
        _enter_namespaces(directory, prepared, limit, spec, outcome, secrets)
    return _run_flow(directory, prepared, limit, spec, outcome, secrets)


def rehearse() -> None:
    """Run a flow of our own, which leaves all that flows need as they will need it: in memory that need not
    be copied any more when somebody waits, with code that the interpreter has adapted to what it met."""
    null = os.open(os.devnull, os.O_WRONLY)
    path = list(sys.path)
    source = {"kind": "script", "directory": os.path.dirname(__file__), "path": "rehearsal.py"}
    try:
        emitter = Emitter(null)
        with RunContext({"run_id": "", "parameters": {}, "attempt": 0, "secrets": {}}):
            loaded = loader.load(source, "rehearsal")
            emitter.emit("loaded", flow=loaded.flow.name, sha256=loaded.sha256)
            state = loaded.flow.execute({}, _Observer(emitter, RunDirectory("/nonexistent")))
            assert state.is_successful(), state.message
    finally:
        os.close(null)
        sys.path[:] = path


def _run_flow(
    directory: RunDirectory,
    prepared: sandbox.Sandbox,
    limit: Limits,
    spec: Mapping[str, Any],
    outcome: int,
    secrets: int | None,
) -> int:
    """Confine this process and run the flow in it; the exit code."""
    myself = os.getpid()
    try:
        prepared.confine(spec["sandbox"], directory, spec, limit)
        values = _read_secrets(secrets)
        linux.close_all_but(outcome, STDIO)
        _settle(directory, spec)
        result = _execute(directory, spec, values)
    except FlowError as error:
        result = _failed(_one_line(error), retryable=False)
    if os.getpid() != myself:
        os._exit(1)  # a process that user code forked came back up here: it speaks for nobody
    os.write(outcome, json.dumps(result).encode())
    bytecode.leave_word(directory)
    _finish()
    return 0 if result["state"] == "completed" else 1


def _detach(parent: int) -> None:
    """Leave the supervisor's world. Signals stay blocked until there is something to run."""
    os.setsid()
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the supervisor died before it could take us along
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _enter_namespaces(
    directory: RunDirectory,
    prepared: sandbox.Sandbox,
    limit: Limits,
    spec: Mapping[str, Any],
    outcome: int,
    secrets: int | None,
) -> None:
    """Go on in :func:`run_inside`, inside of bubblewrap. What needs the rights of outside is done here."""
    spec_fd = os.open(directory.spec_path, os.O_RDONLY)
    prepared.confine_outside(limit)
    inside = [
        str(spec_fd),
        str(outcome),
        "none" if secrets is None else str(secrets),
        prepared.rules.to_json(),
    ]
    program = [sys.executable, sys.argv[0], "--flow", *inside]
    kept = [fd for fd in (spec_fd, outcome, secrets) if fd is not None]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # bubblewrap must not end before the flow has heard it
    bubblewrap.execute(prepared.rules, directory, spec, limit.memory, program, kept)


def prepare() -> None:
    """Once in a process that flow processes are forked from: what they inherit. SIGPIPE stays ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _stop)
    _log_as_events()
    _inherited.update(os.environ)
    _streams.extend(_make_streams())


def _stop(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; the second word is SIGKILL
    raise Stopped


def _read_secrets(fd: int | None) -> dict[str, str]:
    """The declared secrets, from a descriptor that only this process reads."""
    if fd is None:
        return {}
    with open(fd, "rb") as file:
        file.seek(0)
        values: dict[str, str] = json.load(file)
    return values


def _settle(directory: RunDirectory, spec: Mapping[str, Any]) -> None:
    """Environment, working directory, streams and import path of the flow."""
    os.umask(0o077)
    environment = dict(spec["env"])
    environment.update(PYTHONUNBUFFERED="1", FLOWAGENT_RUN=f"{spec['run_id']}.{spec['attempt']}")
    if spec["sandbox"] != sandbox.CONTAINER:  # there they are of this run only, as the image has them
        environment.update(HOME=directory.home, TMPDIR=directory.tmp)
    for name in _inherited.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if _inherited.get(name) != value:
            os.environ[name] = value
    working_dir = spec.get("working_dir") or directory.work
    try:
        os.chdir(working_dir)
    except OSError as error:
        raise FlowError(f"cannot enter working_dir {working_dir}: {error.strerror}") from None
    for name, stream in zip(("stdin", "stdout", "stderr"), _streams):
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = [spec["source"].get("path") or spec["source"].get("module") or ""]
    linux.set_process_name("flow:" + spec["flow_name"])
    # The launcher's own entry stays first (flowagent and cloudpickle), then what the operator names.
    extra = [*spec["import_paths"], *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[1:1] = [path for path in extra if path not in sys.path]
    gc.enable()


def _make_streams() -> list[io.TextIOWrapper]:
    """What flows have as standard input, output and error. What they will write to is a pipe, and what a
    stream is made for is looked at once: so they are made for one."""
    own = [os.dup(1), os.dup(2)]
    pipe = os.pipe()
    for number in (1, 2):
        os.dup2(pipe[1], number)
    try:
        return [_standard_stream(number) for number in range(3)]
    finally:
        for number, fd in zip((1, 2), own):
            os.dup2(fd, number)
        for fd in (*own, *pipe):
            os.close(fd)


def _standard_stream(number: int) -> io.TextIOWrapper:
    """Lines are written when they end, bytes at once: no kill loses them."""
    raw = open(number, "rb" if number == 0 else "wb", buffering=0)  # noqa: SIM115 - for the process' life
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _execute(directory: RunDirectory, spec: Mapping[str, Any], secrets: dict[str, str]) -> dict[str, Any]:
    """Load and run the flow; the outcome as the agent records it."""
    emitter = Emitter(os.dup(1))  # its own, so that user code may redirect or close standard output
    _events.emitter = emitter
    values = {
        "run_id": spec["run_id"],
        "flow_name": spec["flow_name"],
        "parameters": spec["parameters"],
        "attempt": spec["attempt"],
        "labels": tuple(spec["labels"]),
        "scheduled_for": datetime.fromtimestamp(spec["scheduled_for"], timezone.utc),
        "secrets": secrets,
    }
    with RunContext(values):
        return _load_and_run(directory, spec, emitter)


def _load_and_run(directory: RunDirectory, spec: Mapping[str, Any], emitter: Emitter) -> dict[str, Any]:
    try:
        loaded = loader.load({**spec["source"], "bytecode": spec["bytecode"]}, spec["flow_name"])
    except (FlowError, Exception) as error:
        if not isinstance(error, FlowError):
            _print_user_traceback(error)
        return _failed("could not be loaded: " + _one_line(error), retryable=not isinstance(error, FlowError))
    except SystemExit as error:
        return _failed(f"called sys.exit({error.code!r}) while it was being loaded")
    emitter.emit("loaded", flow=loaded.flow.name, sha256=loaded.sha256)
    if loaded.flow.result is None and spec.get("result") is not None:
        loaded.flow.result = result_from_json(spec["result"])
    state = loaded.flow.execute(
        spec["parameters"], _Observer(emitter, directory, inline=spec["sandbox"] == sandbox.CONTAINER)
    )
    if state.is_successful():
        return {"state": "completed", "reason": None}
    return _failed(state.message or "failed")


def _failed(reason: str, retryable: bool = True) -> dict[str, Any]:
    return {"state": "failed", "reason": reason[:MAX_REASON], "retryable": retryable}


def _one_line(error: BaseException) -> str:
    text = str(error).replace("\n", " ").strip()
    if isinstance(error, FlowError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _print_user_traceback(error: BaseException) -> None:
    """The traceback from the user's first frame on; ours above it would only be in the way."""
    frames = error.__traceback__
    floor = os.path.dirname(os.path.abspath(loader.__file__))
    while frames is not None and os.path.dirname(frames.tb_frame.f_code.co_filename) in (floor, ""):
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames)


def _finish() -> None:
    """What an interpreter does at its end, without unwinding into the launcher's frames below us."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


class _EventHandler(logging.Handler):
    emitter: Emitter

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
            if record.exc_info:
                message += "\n" + logging.Formatter().formatException(record.exc_info)
            data = {"level": record.levelname, "logger": record.name, "message": message}
            task = getattr(record, "task", None)
            if task:
                data["task"] = task
            self.emitter.emit("log", **data)
        except Exception:
            self.handleError(record)


_events = _EventHandler()


def _log_as_events() -> None:
    """Have the root logger write events."""
    logging.root.handlers[:] = [_events]
    logging.root.setLevel(logging.INFO)
    logging.captureWarnings(True)


class _Observer(Observer):
    """Writes what happens to tasks as events, and results as files that the agent picks up; ``inline``: they
    are in its reach by the output only."""

    def __init__(self, emitter: Emitter, directory: RunDirectory, *, inline: bool = False) -> None:
        self._emitter = emitter
        self._inline = inline
        self._directory = directory.results
        self._repeats, self._restored = directory.read_restored()
        self._files = 0
        self._pid = os.getpid()

    def task(self, slug: str, name: str, state: str, reason: str | None = None, tries: int = 1) -> None:
        self._check_process()
        data = {"task": slug, "name": name, "state": state, "tries": tries}
        if reason:
            data["reason"] = reason[:MAX_REASON]
        self._emitter.emit("task", **data)

    def nothing(self, slug: str, inputs: str | None = None) -> None:
        self._check_process()
        self._emitter.emit("result", task=slug, inputs=inputs)

    def restored(self, slug: str, inputs: str | None = None) -> Restored | None:
        """A value that the agent has fetched; one that cannot be read here has to be made again."""
        kept = self._restored.get(slug)
        if kept is None or kept["inputs"] != inputs:
            return None
        try:
            return Restored(self._read(kept), self._repeats)
        except Exception as error:
            get_logger().warning("%s: its result cannot be read again: %s", slug, _one_line(error))
            return None

    def _read(self, kept: Mapping[str, Any]) -> Any:
        if kept["file"] is None:
            return None
        with open(os.path.join(self._directory, kept["file"]), "rb") as file:
            return serializer_named(kept["serializer"]).loads(file.read())

    def result(self, slug: str, value: Any, declaration: Any, inputs: str | None = None) -> None:
        self._check_process()
        serializer = declaration.serializer
        data = serializer_named(serializer).dumps(value)
        self._files += 1
        name = str(self._files)
        if self._inline:
            relay.emit_file(self._emitter, name, data)
        else:
            with open(os.path.join(self._directory, name), "wb") as file:
                file.write(data)
        self._emitter.emit(
            "result",
            task=slug,
            inputs=inputs,
            file=name,
            serializer=serializer,
            location=format_location(declaration, {name: context.get(name) for name in LOCATION_NAMES}),
        )

    def _check_process(self) -> None:
        """A process that user code forked, and let come back up here, would execute the rest again."""
        if os.getpid() != self._pid:
            os._exit(1)
