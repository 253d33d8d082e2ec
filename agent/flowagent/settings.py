"""Settings of a command or an agent: from the configuration file, the environment and flags."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flowagent import kinds
from flowagent.errors import SettingsError, UsageError, one_line

PREFIX = "FLOWAGENT_"
DEFAULT_HOME = Path("~/.flowagent")
FILE = "config.toml"
TOP_LEVEL = ("home", "store", "cache", "ssh")
"""Keys of the configuration file outside of its ``[agent]`` table."""
SECRETIVE = ("store", "env", "notify", "engine", "registry_allow")
"""Settings that may hold passwords or tokens: their values are not printed as they are."""


DEFAULT_MAX: Mapping[str, float | None] = {
    "processes": 2048,
    "open_files": 65536,
    "output": 1 << 30,
    "disk": 20 << 30,
    "memory": int(0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
}
"""What a run may use if nobody says otherwise: more than any should need, less than harms the machine."""


LEASES = {"kubernetes": 90.0}
"""Seconds that runs are leased for by default, where not as everywhere: a pod takes its time to end."""
CACHE_MAX_AGE = 30 * 86400.0
"""Seconds that sources and mirrors are kept without being used, if nobody says otherwise."""
MAX_SOURCE = 8 << 30
"""How many bytes a source may have, if nobody says otherwise."""


@dataclass(frozen=True)
class Ssh:
    """How an agent gets to hosts by ssh. ``directory``: of keys, known_hosts and config; None: ~/.ssh.

    ``hosts``, by host or by ``host/path/of/repository``, have a ``key`` or ``key_secret``, and
    ``known_hosts``."""

    directory: Path | None = None
    client: str = "asyncssh"
    hosts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


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
    runner: str = "process"  # what runs are executed in
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
    max_source: int = MAX_SOURCE  # bytes that a source may have
    ssh_dir: Path | None = None  # keys, known_hosts and config; None: ~/.ssh
    ssh_client: str = "asyncssh"  # or openssh
    ssh: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # keys and known hosts by host
    token_hosts: tuple[str, ...] = ()  # besides the public forges, who gets the agent's own tokens
    # of runs in containers
    engine: str | None = None  # URL of the Docker engine; None: as the docker command finds it
    image: str | None = None  # for runs that name none; None: Python of the agent's version
    pull: str = "missing"  # when images are pulled: missing, always, never
    registry_allow: tuple[str, ...] | None = None  # registries that images may be from; None: any
    volumes: tuple[str, ...] = ()  # mounted into every container: SOURCE:TARGET[:ro]
    networks: tuple[str, ...] = ()  # that every container is in
    allow_host_config: tuple[str, ...] = ()  # keys of a host_config that flows may set besides harmless ones
    keep: str = "none"  # which containers, or jobs, are kept when they have ended: none, failed
    # of runs in pods
    context: str | None = None  # of the kubeconfig; None: the current one
    namespace: str | None = None  # that jobs are made in; None: the one of the context, or of the agent's pod
    job_template: Path | None = None  # what every job is made from, below what flows ask for
    service_account: str | None = None  # of pods whose flows name none
    image_pull_secrets: tuple[str, ...] = ()  # of pods whose flows name none
    start_timeout: float = 300.0  # how long a pod may take to start
    health_address: str | None = None  # HOST:PORT or a path: where health and metrics are served
    max_runs: int | None = None  # after so many claims, drain and end
    idle_exit: float | None = None  # after so long without a run, end
    reserve: int = 500 << 20  # bytes: with less free on its disks, the agent takes nothing new
    hooks: Path | None = None  # a directory of programs that are run around sources and runs
    hook_timeout: float = 30.0
    notify: str | None = None  # a URL that is told of every run that ended
    notify_key: str | None = None  # the secret that signs it
    tracing: str = "off"
    cache_max_size: int | None = None  # bytes that an agent keeps of sources and mirrors; None: all
    cache_max_age: float | None = CACHE_MAX_AGE  # after so long without use they go; None: never
    cache: Path | None = None  # where sources are kept; None: in the home
    config: Path | None = None  # the file that these were read from
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Of what was not left at its default, by field: where it was set."""

    @property
    def capacity(self) -> int:
        """How many runs an agent executes at the same time: the limit, or twice the CPUs it may use."""
        return self.limit or max(2, 2 * len(os.sched_getaffinity(0)))

    @property
    def openings(self) -> Ssh:
        """How this agent gets to hosts by ssh."""
        return Ssh(self.ssh_dir, self.ssh_client, self.ssh)

    @property
    def flows_dir(self) -> Path:
        return self.home / "flows"

    @property
    def results_dir(self) -> Path:
        return self.home / "results"

    @property
    def sources_dir(self) -> Path:
        return (self.cache or self.home) / "sources"

    @property
    def mirrors_dir(self) -> Path:
        return (self.cache or self.home) / "mirrors"

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

    ``config`` None: the file that FLOWAGENT_CONFIG names, else config.toml in the home, if it is there. Flags
    are ``overrides`` by field name; None means not given. The home is created, readable by its owner only.

    :raises SettingsError: a key is unknown, a value has the wrong type, or the file cannot be read."""
    flags = {key: value for key, value in (overrides or {}).items() if value is not None}
    for key in flags:
        if key not in _KINDS:
            raise SettingsError(_unknown(key, "option", list(_KINDS)))
    if config is None and (named := environ.get(f"{PREFIX}CONFIG")):
        config = Path(named).expanduser()
    environment = {
        key: (value, f"variable {PREFIX}{key.upper()}") for key, value in _from_environment(environ).items()
    }
    given = {
        key: (_value(key, value, f"option {key}"), f"option --{key.replace('_', '-')}")
        for key, value in flags.items()
    }
    above = environment | given
    home = above["home"][0] if "home" in above else DEFAULT_HOME.expanduser()
    path = config or home / FILE
    file = {key: (value, f"file {path}") for key, value in _from_file(config, path).items()}
    found = file | above
    values: dict[str, Any] = {"home": home, **{key: value for key, (value, _) in found.items()}}
    home = values["home"]
    values.setdefault("store", f"sqlite:///{home}/flowagent.db")
    if values.get("runner") in LEASES:
        values.setdefault("lease", LEASES[values["runner"]])
    values["max"] = {**DEFAULT_MAX, **values.get("max", {})}
    values["config"] = config.absolute() if config is not None else None
    values["origins"] = {key: origin for key, (_, origin) in found.items()}
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"home {home} cannot be created: {error.strerror}; set {PREFIX}HOME to a directory of yours"
        ) from error
    return Settings(**values)


# -- layers ------------------------------------------------------------------------------------------


def _from_file(config: Path | None, path: Path) -> dict[str, Any]:
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
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingsError(f"configuration file {path} is not valid TOML: {error}; correct it") from error
    agent = data.pop("agent", {})
    if not isinstance(agent, dict):
        raise SettingsError(f"{path}: agent has the value {agent!r}, and a table [agent] is expected")
    known = [*TOP_LEVEL, *(f"agent.{key}" for key in _KINDS if key not in TOP_LEVEL)]
    values = {}
    for given, value in (*data.items(), *((f"agent.{key}", agent[key]) for key in agent)):
        if given not in known:
            raise SettingsError(
                _misplaced(given, value, f"{path}: key") or _unknown(given, f"{path}: key", known)
            )
        key = given.removeprefix("agent.")
        values[key] = _value(key, value, f"{path}: {given}")
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for variable, text in environ.items():
        key = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or variable.startswith(f"{PREFIX}SECRET_") or key == "config":
            continue
        if key in _KINDS:
            values[key] = _value(key, text, variable)
        # other variables with this prefix are none of ours, unless one is a slip of the pen
        elif nearest := _close(key, _KINDS, 0.8):
            raise SettingsError(
                f"variable {_shown(variable)} is unknown; did you mean {PREFIX}{nearest[0].upper()}?"
            )
    return values


def _close(key: str, known: Iterable[str], cutoff: float) -> list[str]:
    import difflib

    return difflib.get_close_matches(key, list(known), 1, cutoff)


def _unknown(key: str, what: str, known: list[str]) -> str:
    nearest = _close(key, known, 0.5) or [
        name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
    return f"{what} {_shown(key)} is unknown; {hint}"


def _misplaced(key: str, value: Any, what: str) -> str | None:
    """The error of a key in the file that is known, though not there or not so."""
    table, _, name = key.rpartition(".")
    hint = None
    if table and name in TOP_LEVEL:
        hint = f"{name} belongs at the top of the file, above [agent]"
    elif isinstance(value, dict) and not table and (nearest := _close(key, ("agent", "ssh"), 0.5)):
        hint = f"did you mean [{nearest[0]}]?"
    elif name in kinds.LIMITS:
        hint = f"did you mean max = {{ {name} = … }} below [agent]?"
    return f"{what} {_shown(key)} is unknown; {hint}" if hint else None


def _shown(key: str) -> str:
    """A name as it can stand in a line."""
    return key if key.isprintable() else one_line(repr(key), 100)


# -- kinds of values -----------------------------------------------------------------------------------


def _optional(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Such a value, or ``none``."""

    def read(value: Any) -> Any:
        if isinstance(value, str) and value.lower() == "none":
            return None
        try:
            return kind(value)
        except ValueError as error:
            raise ValueError(f"{error}, or none") from None

    return read


_KINDS: Mapping[str, Callable[[Any], Any]] = {
    "home": kinds.path,
    "store": kinds.store,
    "cache": kinds.path,
    "name": kinds.string,
    "labels": kinds.labels,
    "hostname_label": kinds.boolean,
    "require_labels": kinds.boolean,
    "limit": kinds.count,
    "env": kinds.environment,
    "import_paths": kinds.paths,
    "log_format": kinds.choice("auto", "console", "json", "journal"),
    "log_level": kinds.choice("debug", "info", "warning", "error"),
    "lease": kinds.seconds,
    "grace": kinds.seconds,
    "poll": kinds.seconds,
    "drain": kinds.seconds,
    "sandbox": kinds.choice("auto", "process", "landlock", "namespace"),
    "allow_read": kinds.paths,
    "allow_write": kinds.paths,
    "run_as": kinds.string,
    "preload": kinds.modules,
    "max": kinds.limits,
    "health_address": kinds.address,
    "max_runs": kinds.count,
    "idle_exit": kinds.seconds,
    "reserve": kinds.size,
    "cache_max_size": _optional(kinds.size),
    "cache_max_age": _optional(kinds.seconds),
    "hooks": kinds.path,
    "hook_timeout": kinds.seconds,
    "notify": kinds.web_address,
    "notify_key": kinds.secret_name,
    "tracing": kinds.choice("off", "otlp"),
    "max_source": kinds.size,
    "ssh_dir": kinds.path,
    "ssh_client": kinds.choice("asyncssh", "openssh"),
    "ssh": kinds.ssh_hosts,
    "token_hosts": kinds.hosts,
    "runner": kinds.choice("process", "docker", "kubernetes"),
    "engine": kinds.string,
    "image": kinds.string,
    "pull": kinds.choice("missing", "always", "never"),
    "registry_allow": kinds.strings,
    "volumes": kinds.strings,
    "networks": kinds.strings,
    "allow_host_config": kinds.strings,
    "keep": kinds.choice("none", "failed"),
    "context": kinds.string,
    "namespace": kinds.string,
    "job_template": kinds.path,
    "service_account": kinds.string,
    "image_pull_secrets": kinds.strings,
    "start_timeout": kinds.seconds,
}
assert set(_KINDS) == {item.name for item in fields(Settings)} - {"config", "origins"}


def _value(key: str, value: Any, where: str) -> Any:
    try:
        return _KINDS[key](value)
    except UsageError as error:
        raise SettingsError(f"{where}: {error}") from error
    except ValueError as error:
        said = "a value that cannot be" if key in SECRETIVE else f"the value {value!r}"
        raise SettingsError(f"{where} has {said}, and {error} is expected") from None
