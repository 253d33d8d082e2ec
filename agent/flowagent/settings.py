"""Settings of a command or an agent: from the configuration file, the environment and flags."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flowagent import labels as label_names
from flowagent.errors import SettingsError, UsageError
from flowagent.flows import declarations
from flowagent.flows.errors import FlowError

PREFIX = "FLOWAGENT_"
FILE = "config.toml"
TOP_LEVEL = ("home", "store")
"""Keys of the configuration file outside of its ``[agent]`` table."""


DEFAULT_MAX: Mapping[str, float | None] = {
    "processes": 2048,
    "open_files": 65536,
    "output": 1 << 30,
    "disk": 20 << 30,
    "memory": int(0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
}
"""What a run may use if nobody says otherwise: more than any should need, less than harms the machine."""


def hostname() -> str:
    """The name of this machine, as it is used for labels and messages."""
    return os.uname().nodename  # as socket.gethostname, whose module takes its time


@dataclass(frozen=True)
class Settings:
    """What a command or an agent goes by. Durations are seconds."""

    home: Path
    store: str
    name: str | None = None  # of the agent; None: made from the host name
    labels: tuple[str, ...] = ()
    hostname_label: bool = True
    require_labels: bool = False
    limit: int | None = None  # runs at the same time; None: see capacity
    env: Mapping[str, str] = field(default_factory=dict)  # added to the environment of every flow
    import_paths: tuple[Path, ...] = ()
    log_format: str = "auto"
    log_level: str = "info"
    lease: float = 30.0
    grace: float = 10.0  # from SIGTERM to SIGKILL
    poll: float = 5.0  # fallback when no doorbell rings
    drain: float = 300.0  # how long a stopping agent waits for its runs before it cancels them
    sandbox: str = "auto"  # the weakest level that a run gets; auto: the best that forks
    allow_read: tuple[Path, ...] = ()  # of what is closed to flows, what they may read
    allow_write: tuple[Path, ...] = ()  # outside of their own directories, what they may write
    run_as: str | None = None  # the user that flows run as; None: the agent's
    preload: tuple[str, ...] = ()  # modules that every launcher imports before it forks
    max: Mapping[str, float | None] = field(default_factory=lambda: DEFAULT_MAX)  # limits of every run
    config: Path | None = None  # the file that these were read from

    @property
    def capacity(self) -> int:
        """How many runs an agent executes at the same time: the limit, or twice the CPUs it may use."""
        return self.limit or max(2, 2 * len(os.sched_getaffinity(0)))

    @property
    def flows_dir(self) -> Path:
        return self.home / "flows"

    @property
    def results_dir(self) -> Path:
        return self.home / "results"

    @property
    def sources_dir(self) -> Path:
        return self.home / "sources"

    @property
    def agents_dir(self) -> Path:
        return self.home / "agents"

    @property
    def secrets_dir(self) -> Path:
        return self.home / "secrets"


def load(
    config: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from ``config``, overridden by ``FLOWAGENT_*`` variables, overridden by flags.

    ``config`` None: config.toml in the home, if it is there. Flags are ``overrides`` by field name; None
    means not given. The home is created, readable by its owner only.

    :raises SettingsError: a key is unknown, a value has the wrong type, or the file cannot be read."""
    flags = {key: value for key, value in (overrides or {}).items() if value is not None}
    for key in flags:
        if key not in _KINDS:
            raise SettingsError(_unknown(key, "option", list(_KINDS)))
    values: dict[str, Any] = {"home": Path("~/.flowagent")}
    layers = (_from_environment(environ), {key: _value(key, flags[key], f"option {key}") for key in flags})
    for layer in layers:
        if "home" in layer:
            values["home"] = layer["home"]
    values["home"] = values["home"].expanduser().absolute()
    values |= _from_file(config, values["home"] / FILE)
    for layer in layers:
        values |= layer
    home = values["home"] = values["home"].expanduser().absolute()
    values.setdefault("store", f"sqlite:///{home}/flowagent.db")
    values["max"] = {**DEFAULT_MAX, **values.get("max", {})}
    values["config"] = config.absolute() if config is not None else None
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"home {home} cannot be created: {error.strerror}; set {PREFIX}HOME to a directory of yours"
        ) from error
    return Settings(**values)


# -- layers ------------------------------------------------------------------------------------------


def _from_file(config: Path | None, default: Path) -> dict[str, Any]:
    path = config or default
    try:
        text = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if config is None:
            return {}
        raise SettingsError(f"configuration file {path} does not exist; check --config") from None
    except OSError as error:
        raise SettingsError(
            f"configuration file {path} cannot be read: {error.strerror}; check --config"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"configuration file {path} is not valid TOML: {error}; correct it") from error
    import tomllib

    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"configuration file {path} is not valid TOML: {error}; correct it") from error
    agent = data.pop("agent", {})
    if not isinstance(agent, dict):
        raise SettingsError(f"{path}: agent has the value {agent!r}, and a table [agent] is expected")
    known = [*TOP_LEVEL, *(f"agent.{key}" for key in _KINDS if key not in TOP_LEVEL)]
    values = {}
    for given, value in (*data.items(), *((f"agent.{key}", agent[key]) for key in agent)):
        if given not in known:
            raise SettingsError(_unknown(given, f"{path}: key", known))
        key = given.removeprefix("agent.")
        values[key] = _value(key, value, f"{path}: {given}")
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for variable, text in environ.items():
        key = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or variable.startswith(f"{PREFIX}SECRET_"):
            continue
        if key in _KINDS:
            values[key] = _value(key, text, variable)
        # other variables with this prefix are none of ours, unless one is a slip of the pen
        elif nearest := _close(key, _KINDS, 0.8):
            raise SettingsError(f"variable {variable} is unknown; did you mean {PREFIX}{nearest[0].upper()}?")
    return values


def _close(key: str, known: Iterable[str], cutoff: float) -> list[str]:
    import difflib

    return difflib.get_close_matches(key, list(known), 1, cutoff)


def _unknown(key: str, what: str, known: list[str]) -> str:
    nearest = _close(key, known, 0.5) or [
        name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
    return f"{what} {key} is unknown; {hint}"


# -- kinds of values -----------------------------------------------------------------------------------


def _string(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty string")
    return value


def _choice(*choices: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return value.lower()

    return read


def _boolean(value: Any) -> bool:
    words = {
        "true": True,
        "1": True,
        "yes": True,
        "on": True,
        "false": False,
        "0": False,
        "no": False,
        "off": False,
    }
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("true or false")


def _count(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number from 1 on")
    return value


def _seconds(value: Any) -> float:
    expected = "a number of seconds above 0"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(expected)
    try:
        number = float(value)
    except ValueError:
        raise ValueError(expected) from None
    if not 0 < number < 1e9:
        raise ValueError(expected)
    return number


def _labels(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return label_names.parse([value]) if value.strip() else ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of strings")
    return label_names.parse(value)


def _environment(value: Any) -> dict[str, str]:
    """A table of strings, or ``KEY=VALUE`` strings: a list of them, or one with commas between."""
    expected = "a table of strings, or KEY=VALUE"
    if isinstance(value, str):
        value = value.split(",") if value.strip() else []
    if isinstance(value, (list, tuple)):
        if not all(isinstance(item, str) and item.partition("=")[0] and "=" in item for item in value):
            raise ValueError(expected)
        value = dict(item.split("=", 1) for item in value)
    if not isinstance(value, Mapping) or not all(isinstance(item, str) for item in (*value, *value.values())):
        raise ValueError(expected)
    for key, text in value.items():
        if not key or "=" in key or "\0" in key + text:
            raise ValueError(expected)
    return dict(value)


def _modules(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(item, str) and all(part.isidentifier() for part in item.split(".")) for item in value
    ):
        raise ValueError("a list of names of modules")
    return tuple(dict.fromkeys(value))


def _limits(value: Any) -> dict[str, float | None]:
    """A table of limits, or ``NAME=VALUE`` strings: a list of them, or one with commas between. The value
    ``none`` takes a default away."""
    if not isinstance(value, Mapping):
        value = _environment(value)
    unlimited = [name for name, text in value.items() if isinstance(text, str) and text.lower() == "none"]
    given = {name: _number(text) for name, text in value.items() if name not in unlimited}
    try:
        declarations.limits(dict.fromkeys(unlimited, 1), "max")
        return {**declarations.limits(given, "max"), **dict.fromkeys(unlimited)}
    except FlowError as error:
        raise ValueError(f"a table of limits ({error})") from None


def _number(text: Any) -> Any:
    """A number that came as text; sizes such as 2G stay what they are."""
    if isinstance(text, str):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _path(value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise ValueError("a path")
    return Path(value).expanduser().absolute()


def _paths(value: Any) -> tuple[Path, ...]:
    if isinstance(value, str):
        value = [item for item in value.split(os.pathsep) if item]
    if not isinstance(value, (list, tuple)):
        raise ValueError("a list of paths")
    return tuple(_path(item) for item in value)


_KINDS: Mapping[str, Callable[[Any], Any]] = {
    "home": _path,
    "store": _string,
    "name": _string,
    "labels": _labels,
    "hostname_label": _boolean,
    "require_labels": _boolean,
    "limit": _count,
    "env": _environment,
    "import_paths": _paths,
    "log_format": _choice("auto", "console", "json"),
    "log_level": _choice("debug", "info", "warning", "error"),
    "lease": _seconds,
    "grace": _seconds,
    "poll": _seconds,
    "drain": _seconds,
    "sandbox": _choice("auto", "process", "landlock", "namespace"),
    "allow_read": _paths,
    "allow_write": _paths,
    "run_as": _string,
    "preload": _modules,
    "max": _limits,
}
assert set(_KINDS) == {item.name for item in fields(Settings)} - {"config"}


def _value(key: str, value: Any, where: str) -> Any:
    try:
        return _KINDS[key](value)
    except UsageError as error:
        raise SettingsError(f"{where}: {error}") from error
    except ValueError as error:
        raise SettingsError(f"{where} has the value {value!r}, and {error} is expected") from None
