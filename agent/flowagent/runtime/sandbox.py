"""What a flow process may do: the levels of isolation, and how the process applies them to itself.

``process``: own session, clean environment, private HOME and TMPDIR, no new privileges, no core dumps, no
inherited descriptors, resource limits, first in line when memory runs out. ``landlock``: reads everything
but credentials and the agent's own state, writes only its run directory and what is granted, reaches no
process outside. ``namespace``: in addition processes, IPC, host name, ``/tmp`` and ``/proc`` of its own, by
bubblewrap.
``container`` is the docker and kubernetes runners'.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flowagent.flows.errors import FlowError
from flowagent.runtime import cgroups, credentials, isolation, landlock, limits, linux, seccomp
from flowagent.runtime.rundir import RunDirectory

PROCESS, LANDLOCK, NAMESPACE, CONTAINER = LEVELS = ("process", "landlock", "namespace", "container")
"""Weakest first."""
OOM_SCORE_ADJ = 500

INHERITED = ("PATH", "LANG", "LANGUAGE", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""Variables (and all ``LC_*``) that a flow process has from the agent; everything else is left out."""


class Rules(NamedTuple):
    """What one agent lets flow processes do; the same for all of its runs."""

    home: str
    """The agent's own state: out of reach but for what a run is given of it."""
    runs: str
    """Where the run directories are."""
    denied: tuple[str, ...] = ()
    """Paths that may not be read, besides the home and the usual places of credentials."""
    read: tuple[str, ...] = ()
    """Of the denied paths, those that runs may be given to read."""
    write: tuple[str, ...] = ()
    """Paths outside of their directories that runs may be given to write."""
    covered: tuple[str, ...] = ()
    """Sockets of services, out of reach where mounts of one's own are possible."""
    user: tuple[int, int, tuple[int, ...]] | None = None
    """The user, group and further groups that flows run as; None: those of the agent."""
    cgroups: tuple[tuple[str, str], ...] = ()
    """Hierarchy and directory in which control groups can be made."""

    @property
    def empty(self) -> str:
        """A directory of the agent's with nothing in it."""
        return self.runs.rpartition("/")[0] + "/empty"

    def to_json(self) -> str:
        return json.dumps(self._asdict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Rules:
        data = json.loads(text)
        user = data["user"]
        return cls(
            home=data["home"],
            runs=data["runs"],
            denied=tuple(data["denied"]),
            read=tuple(data["read"]),
            write=tuple(data["write"]),
            covered=tuple(data["covered"]),
            user=(user[0], user[1], tuple(user[2])) if user else None,
            cgroups=tuple((name, path) for name, path in data["cgroups"]),
        )


# -- which level ---------------------------------------------------------------------------------------


def unavailable(level: str) -> str | None:
    """None if this machine has a level; else why not, in a few words."""
    if level == PROCESS:
        return None
    if level == LANDLOCK:
        return None if landlock.version() else "the kernel has no Landlock"
    if level == NAMESPACE:
        return _bubblewrap_fails()
    return "it takes an agent that runs flows in containers"


def best() -> str:
    """What ``auto`` means here: Landlock, at the speed of a fork; where the kernel lacks it, namespaces."""
    for level in (LANDLOCK, NAMESPACE):
        if unavailable(level) is None:
            return level
    return PROCESS


def choose(floor: str, available: Mapping[str, str | None], minimum: str | None) -> str:
    """The level that a run gets, given the least that its flow accepts; never below ``floor``.

    ``available``: level -> None, or why this machine does not have it.

    :raises FlowError: this machine or version cannot give it; nothing may run then."""
    if minimum is not None and minimum not in LEVELS:
        raise FlowError("unknown sandbox level {!r}; the levels are {}".format(minimum, ", ".join(LEVELS)))
    wanted = LEVELS.index(minimum) if minimum is not None else 0
    for level in LEVELS[max(wanted, LEVELS.index(floor)) :]:
        if available[level] is None:
            return level
    demanded = minimum if minimum is not None and wanted >= LEVELS.index(floor) else floor
    raise FlowError(
        f"sandbox level {demanded!r} is demanded and not to be had here: {available[demanded]}; "
        "use another agent or a lower level"
    )


def _bubblewrap_fails() -> str | None:
    import shutil  # these two import much, which no flow process needs
    import subprocess

    program = shutil.which("bwrap")
    if program is None:
        return "bubblewrap is not installed"
    trial = [program, "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--ro-bind", "/", "/"]
    trial += ["--proc", "/proc", "--dev", "/dev", "--", "/bin/true"]
    try:
        done = subprocess.run(trial, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return f"bubblewrap does not run: {error}"
    if done.returncode != 0:
        return f"bubblewrap does not work here: {done.stderr.strip().splitlines()[-1:]}"
    return None


def gaps(level: str, rules: Rules) -> list[str]:
    """What a level cannot do on this machine, each in a line for people."""
    found = []
    abi = landlock.version()
    if level == PROCESS:
        found.append("flows read and write whatever the user they run as may")
    elif abi == 0:
        found.append("the kernel has no Landlock: only namespaces confine flows")
    else:
        if abi < landlock.SCOPES_SINCE:
            found.append(f"Landlock {abi} of this kernel does not keep flows from signalling other processes")
        if abi < landlock.PORTS_SINCE:
            found.append(f"Landlock {abi} of this kernel cannot allow single TCP ports")
    if level == LANDLOCK and (why := isolation.possible(rules.runs)) is not None:
        found.append(
            f"no mounts and IPC of a run's own ({why}): flows can change modes of files of their user, reach "
            "sockets of services and leave files in /dev/shm"
        )
    if level != PROCESS and not os.access(isolation.BOUND, os.R_OK):
        found.append(
            f"services listen where {isolation.BOUND}, which cannot be read, would say: flows reach them"
        )
    if not seccomp.available():
        found.append("no seccomp filter for this processor")
    for controller, what in ((cgroups.MEMORY, "memory"), (cgroups.PIDS, "processes")):
        if not cgroups.limits(dict(rules.cgroups), controller):
            found.append(f"no control group for {what}: the supervisor looks several times a second")
    return found


def base_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The allow-listed part of an environment."""
    return {name: value for name, value in environ.items() if name in INHERITED or name.startswith("LC_")}


# -- applying it -----------------------------------------------------------------------------------------


class Sandbox:
    """Everything that can be made ready before a run; forked with the launcher's children."""

    def __init__(self, rules: Rules, *, isolates: bool) -> None:
        """``isolates``: whether :mod:`flowagent.runtime.isolation` works here."""
        self.rules = rules
        self.abi = landlock.version()
        self._limits_memory = cgroups.limits(dict(rules.cgroups), cgroups.MEMORY)
        self._isolates = isolates
        self._readable = landlock.Readable([*credentials.places(), *rules.denied, rules.home])
        self._everywhere = [
            landlock.rule_for("/", landlock.READ_DIR),  # names may be seen, everywhere
            *(landlock.rule_for(path, WRITE_DEVICE) for path in landlock.devices()),
        ]
        self._ruleset: landlock.Ruleset | None = None
        self._bound = isolation.Bound()
        self._filters = seccomp.programs(self.abi >= landlock.TRUNCATE_SINCE) if seccomp.available() else {}

    def refresh(self) -> None:
        """Before each fork: what has changed in the file system since."""
        if self._isolates:
            self._bound.look()  # so that each run has to look up only what is new
        if self.abi:
            self._readable.refresh()

    def make_ready(self) -> None:
        """In a process that will confine itself later: what does not depend on the run."""
        if self._isolates:
            self._bound.look()  # again with a run; what it touches of memory makes the first time slow
        if self.abi:
            self._readable.refresh()
            try:
                self._ruleset = self._common_ruleset({})
            except OSError:
                pass  # tried again when there is a run, whose reason then says why

    def _common_ruleset(self, ports: Mapping[str, Any]) -> landlock.Ruleset:
        ruleset = landlock.Ruleset(self.abi, connect=ports.get("connect"), bind=ports.get("bind"))
        ruleset.add(self._everywhere)
        self._readable.hand_to(ruleset)
        return ruleset

    def confine(self, level: str, run: RunDirectory, spec: Mapping[str, Any], limit: limits.Limits) -> None:
        """Apply a level to the calling process, for ever. It fails closed.

        :raises FlowError: there are not enough descriptors for it.
        :raises OSError: the kernel refused."""
        grants = spec["grants"]
        isolated = level == LANDLOCK and self._isolates
        if level != NAMESPACE:  # there it was done before
            # a flow may be left fewer descriptors than its rules are kept in: that limit comes after them
            self._limit(limit)
        if isolated:
            granted = (*grants["read"], *grants["write"])
            covered = [path for path in self.rules.covered if not _opened(path, granted)]
            covered += self._services((*granted, run.path), grants["network"] is not False)
            isolation.isolate(run.work, grants["write"], covered, self.rules.empty, limit.memory)
        if level != NAMESPACE:
            self._change_user()
        if level != PROCESS:
            linux.drop_capabilities()
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        if level != PROCESS and self.abi:
            try:
                self._restrict(run, spec, isolated, level == NAMESPACE)
            except OSError as error:
                if error.errno not in landlock.EXHAUSTED:
                    raise
                raise FlowError(
                    f"cannot be confined: {os.strerror(error.errno)}; the agent's limit of descriptors "
                    "(LimitNOFILE, ulimit -n) or the machine's (fs.file-max) is to be raised"
                ) from error
        if level != NAMESPACE:
            limits.apply_open_files(limit)
        if self._filters:
            own_ipc = isolated or level == NAMESPACE
            network = seccomp.OFFLINE if not grants["network"] else seccomp.ONLINE
            if type(grants["network"]) is dict:
                network = seccomp.PORTS
            seccomp.enforce(self._filters[level != PROCESS, own_ipc, network])

    def confine_outside(self, limit: limits.Limits) -> None:
        """What has to be done before a process enters namespaces in which it will :meth:`confine` itself."""
        self._limit(limit)
        limits.apply_open_files(limit)
        self._change_user()
        hidden = [*credentials.places(), *self.rules.denied, *self.rules.covered, self.rules.home]
        # Whether the run has the network is not known here; where it has, names are looked up by DNS itself.
        found = [path for path in self._services(hidden, names=False) if _is_socket(path)]
        self.rules = self.rules._replace(covered=(*self.rules.covered, *found))

    def _services(self, left_alone: Sequence[str], names: bool) -> set[str]:
        """What is to be covered because somebody listens there now, but at or below ``left_alone``; of other
        runs their whole directories. ``names``: leave those alone, too, who look up hosts."""
        runs = self.rules.runs + "/"
        alone = (*left_alone, *isolation.OF_EVERYBODY, *(isolation.OF_NAMES if names else ()))
        below = tuple(path + "/" for path in alone)
        found = set() if names else set(isolation.OF_NAMES)
        for path in self._bound.look():
            if path not in alone and not path.startswith(below):
                found.add(runs + path[len(runs) :].partition("/")[0] if path.startswith(runs) else path)
        return found

    def _limit(self, limit: limits.Limits) -> None:
        # Forked from one that is not dumpable; that would hide this process' own /proc entries from itself.
        linux.prctl(linux.PR_SET_DUMPABLE, 1)
        score = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(score, b"%d" % OOM_SCORE_ADJ)
        os.close(score)
        limits.apply(limit, memory=not self._limits_memory)

    def _change_user(self) -> None:
        if self.rules.user is None:
            return
        uid, gid, groups = self.rules.user
        supervisor = os.getppid()
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)  # capabilities go with it
        # the kernel has forgotten both of these
        linux.prctl(linux.PR_SET_DUMPABLE, 1)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)

    def _restrict(self, run: RunDirectory, spec: Mapping[str, Any], isolated: bool, namespaces: bool) -> None:
        grants = spec["grants"]
        network = grants["network"]
        ruleset = self._ruleset
        if ruleset is None or type(network) is dict or self._readable.changed():
            self._readable.refresh()
            ruleset = self._common_ruleset(network if type(network) is dict else {})
        every = landlock.handled(self.abi) & ~(landlock.MAKE_CHAR | landlock.MAKE_BLOCK)
        ruleset.allow(run.work, every)
        for path in (*sys.path[:1], spec["bytecode"], *spec["readable"]):
            ruleset.allow(path, landlock.READ)
        for path in grants["read"]:
            ruleset.allow(path, landlock.READ, exactly=True)
        for path in grants["write"]:
            ruleset.allow(path, every | landlock.READ, exactly=True)
        own = [(isolation.SHARED_MEMORY, every)]
        if isolated or namespaces:  # elsewhere terminals are those at which people type
            own.append((isolation.TERMINALS, WRITE_DEVICE))
        for path, rights in own:
            try:
                ruleset.allow(path, rights)
            except OSError:
                pass  # not every machine has it
        if namespaces:
            ruleset.allow(PRIVATE_TMP, every)
        ruleset.enforce()


PRIVATE_TMP = "/tmp"  # noqa: S108 - at level namespace it is empty and the run's own
WRITE_DEVICE = landlock.READ_FILE | landlock.WRITE_FILE | landlock.READ_DIR | landlock.IOCTL_DEV


def grant(rules: Rules, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is given of what its agent allows: all of it, or what its flow asks for.

    :raises FlowError: the flow asks for more."""
    given: dict[str, Any] = {"network": asked.get("network", True)}
    for kind, allowed in (("read", rules.read), ("write", rules.write)):
        wanted = asked.get(kind)
        if wanted is None:
            given[kind] = [path for path in allowed if os.path.exists(path)]
            continue
        for path in wanted:
            open_anyway = kind == "read" and not _hidden(rules, path)
            if not open_anyway and not _within(path, allowed):
                raise FlowError(
                    f"the flow asks to {kind} {path}, which this agent does not allow; "
                    f"start one with --allow-{kind} {path}"
                )
            if not os.path.exists(path):
                raise FlowError(f"the flow asks to {kind} {path}, which is not there")
        # As it is now, and with its links resolved: another flow may put others there before this one begins.
        given[kind] = [os.path.realpath(path) for path in wanted]
    return given


def _opened(path: str, granted: Sequence[str]) -> bool:
    """Whether a path, or something below it, was granted."""
    return any(each == path or each.startswith(path + "/") for each in granted)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


def _hidden(rules: Rules, path: str) -> bool:
    hidden = [*credentials.places(), *rules.denied, rules.home]
    real = os.path.realpath(path)
    return any(_within(real, [each]) or _within(each, [real]) for each in map(os.path.realpath, hidden))


def _within(path: str, directories: Sequence[str]) -> bool:
    """Whether a path is one of the directories or below one."""
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, top]) == top for top in map(os.path.realpath, directories))
