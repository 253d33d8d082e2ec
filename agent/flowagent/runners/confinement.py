"""What an agent lets its flows do: the sandbox' rules from its settings, and what each run gets of them."""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowagent.errors import SandboxError, SettingsError
from flowagent.flows.errors import FlowError
from flowagent.runtime import cgroups, credentials, isolation, sandbox
from flowagent.runtime.limits import Limits
from flowagent.settings import Settings

BYTECODE = "bytecode"
KEPT_FOR = 30 * 86400.0
"""Seconds."""
ENTERED = 0o711
"""The mode of a directory that another user may enter, but not list."""
SOURCES = ("flows", "sources")
"""Parts of the agent's home that hold sources: a run may read its own one there, and in a cache elsewhere."""


class Confinement:
    """The sandbox of one agent. ``runs``: where its run directories are.

    :raises SettingsError: the machine does not have what the settings ask for."""

    def __init__(self, settings: Settings, runs: Path) -> None:
        self._settings = settings
        self._available = {level: sandbox.unavailable(level) for level in sandbox.LEVELS}
        self.floor = sandbox.best() if settings.sandbox == "auto" else settings.sandbox
        if (why := self._available[self.floor]) is not None:
            raise SettingsError(f"sandbox level {self.floor!r} is not to be had here: {why}")
        self.limits = _limits(settings)
        for kind in ("allow_read", "allow_write"):
            for path in getattr(settings, kind):
                for closed in (settings.home, *_cache(settings)):
                    _check_grant(kind, path, closed)
        self.rules = sandbox.Rules(
            home=os.path.realpath(settings.home),
            runs=os.path.realpath(runs),
            denied=_denied(settings),
            read=tuple(os.path.realpath(path) for path in settings.allow_read),
            write=tuple(os.path.realpath(path) for path in settings.allow_write),
            covered=(*isolation.covered(os.environ), *_sockets(settings, runs)),
            user=_user(settings.run_as, runs, settings.sources_dir),
            cgroups=tuple(sorted(cgroups.find().items())),
        )
        self._mode = 0o700 if self.rules.user is None else ENTERED
        self._known: set[str] = set()
        os.makedirs(self.rules.empty, mode=0o555, exist_ok=True)
        self.gaps = sandbox.gaps(self.floor, self.rules)
        """What cannot be enforced here, each in a line."""

    def reload(self, settings: Settings) -> None:
        """Go by other settings, as far as no launcher has to know: the limits."""
        self._settings = settings
        self.limits = _limits(settings)

    def level(self, config: Mapping[str, Any]) -> str:
        """The level of a run. :raises SandboxError: its flow demands more than there is."""
        minimum = config.get("sandbox")
        if isinstance(config.get("network"), Mapping) and minimum in (None, sandbox.PROCESS):
            minimum = sandbox.LANDLOCK  # the one that knows ports
        try:
            return sandbox.choose(self.floor, self._available, minimum)
        except FlowError as error:
            raise SandboxError(str(error)) from None

    def grants(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a run may do beyond its level. :raises SandboxError: its flow asks for more than that."""
        try:
            return sandbox.grant(self.rules, config)
        except FlowError as error:
            raise SandboxError(str(error)) from None

    def limits_of(self, config: Mapping[str, Any]) -> Limits:
        """The limits of a run: the agent's, where its flow does not ask for less."""
        asked = dict(config.get("limits") or {})
        if config.get("timeout"):
            asked["wall_time"] = min(config["timeout"], asked.get("wall_time", config["timeout"]))
        return self.limits.tightened(asked)

    def readable(self, source: Path) -> list[str]:
        """The source of a run, if it lies in the agent's home or cache, which are closed otherwise."""
        real = os.path.realpath(source)
        parts = [os.path.join(self.rules.home, name) for name in SOURCES]
        parts += [os.path.realpath(self._settings.sources_dir)]
        return [real] if any(real.startswith(part + os.sep) for part in parts) else []

    def bytecode(self, source: Path) -> str:
        """The directory for byte code of a source: one for each, so that no run sees another's."""
        name = hashlib.sha256(os.fsencode(source)).hexdigest()[:32]
        directory = self._settings.home / BYTECODE / name
        if name not in self._known:
            directory.mkdir(mode=self._mode, parents=True, exist_ok=True)
            self._known.add(name)
        return str(directory)

    def sweep(self) -> None:
        """Remove byte code that has not been added to for long; what is still in use is made anew."""
        with suppress(OSError):
            for directory in (self._settings.home / BYTECODE).iterdir():
                if time.time() - directory.stat().st_mtime > KEPT_FOR:
                    shutil.rmtree(directory, ignore_errors=True)

    def hand_over(self, directory: str, source: Path) -> None:
        """Give what is in a run directory for the flow to the user that it runs as, and let that user come to
        a source in the cache."""
        if self.rules.user is not None:
            if self.readable(source):
                os.chmod(source.parent, ENTERED)
            uid, gid, _ = self.rules.user
            os.chmod(directory, ENTERED)
            # Lowest first: another flow of that user must not put a link where the next one is given away.
            for path, _, _ in os.walk(os.path.join(directory, "work"), topdown=False):
                os.chown(path, uid, gid, follow_symlinks=False)


def _limits(settings: Settings) -> Limits:
    return Limits().tightened({name: limit for name, limit in settings.max.items() if limit is not None})


def _cache(settings: Settings) -> list[Path]:
    """The directory of the source cache, if it is not in the home."""
    home, cache = os.path.realpath(settings.home), os.path.realpath(settings.cache or settings.home)
    if settings.cache is None or os.path.commonpath([home, cache]) == home:
        return []
    try:
        settings.sources_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"cache {cache} cannot be used: {error.strerror}; make it, and give it to the agent's user"
        ) from error
    return [settings.cache]


def _check_grant(kind: str, path: Path, directory: Path) -> None:
    option = "--" + kind.replace("_", "-")
    real, closed = os.path.realpath(path), os.path.realpath(directory)
    if not os.path.exists(real):
        raise SettingsError(f"{option} {path}: there is no such path")
    if os.path.commonpath([real, closed]) in (real, closed):
        raise SettingsError(
            f"{option} {path} would open the agent's own files in {directory}; name other directories"
        )


def _denied(settings: Settings) -> tuple[str, ...]:
    """Files of the agent that are outside of its home."""
    found = [os.environ[name] for name in ("CREDENTIALS_DIRECTORY",) if name in os.environ]
    found += map(str, _cache(settings))
    if settings.run_as is not None:  # then there are two users whose homes hold credentials
        names = [settings.run_as, pwd.getpwuid(os.getuid()).pw_name]
        for home in [os.path.expanduser("~" + name) for name in names]:
            found += [os.path.join(home, name) for name in credentials.OF_USERS]
    if settings.config is not None:
        found.append(str(settings.config))
    if settings.store.startswith("sqlite:"):
        path = settings.store[len("sqlite:///") :]
        found += [path + suffix for suffix in ("", "-wal", "-shm", "-journal", ".bells")]
    return tuple(os.path.realpath(path) for path in found)


def _sockets(settings: Settings, runs: Path) -> list[str]:
    """Where the agent and its launchers listen. They know friends from strangers; still, nothing of a flow's
    is there."""
    found = [os.path.realpath(runs.parent / "launchers")]
    if settings.store.startswith("sqlite:"):
        found.append(os.path.realpath(settings.store[len("sqlite:///") :] + ".bells"))
    return found


def user(name: str) -> pwd.struct_passwd:
    """The user that flows run as. :raises SettingsError: flows cannot run as that one here."""
    if os.geteuid() != 0:
        raise SettingsError("--run-as takes an agent that runs as root; start it as root, or leave this out")
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise SettingsError(
            f"--run-as {name}: there is no such user; make one: useradd --system {name}"
        ) from None
    if entry.pw_uid == 0:
        raise SettingsError("--run-as takes a user other than root; leave it out to run flows as root")
    return entry


def _user(name: str | None, runs: Path, sources: Path) -> tuple[int, int, tuple[int, ...]] | None:
    """The same in numbers, once the way to its runs is open."""
    if name is None:
        return None
    entry = user(name)
    groups = tuple(sorted(os.getgrouplist(name, entry.pw_gid)))
    _open_the_way(runs, sources, entry.pw_uid, groups)
    return entry.pw_uid, entry.pw_gid, groups


def _open_the_way(runs: Path, sources: Path, uid: int, groups: tuple[int, ...]) -> None:
    """See to it that a user can enter the directories above the run directories and the sources, without
    listing them."""
    home = runs.parents[2]
    parts = [sources, *(home / name for name in ("agents", "flows", "ground", BYTECODE))]
    for directory in (home, *parts, runs.parent, runs):
        directory.mkdir(mode=0o700, exist_ok=True)  # whoever would make it later would close it
        directory.chmod(directory.stat().st_mode | 0o011)
    for directory in dict.fromkeys((*home.parents, *sources.parents)):
        if directory == home:
            continue
        status = directory.stat()
        bit = 0o100 if status.st_uid == uid else 0o010 if status.st_gid in groups else 0o001
        if not status.st_mode & bit:
            raise SettingsError(
                f"--run-as: that user may not enter {directory}; use a FLOWAGENT_HOME that it can reach, "
                "such as /var/lib/flowagent"
            )
