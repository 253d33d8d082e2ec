"""What is not to be changed: files of the agent, of other runs and of the machine."""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Callable

from . import World, creates, opens, probe

SAME_USER = "at level process a flow writes whatever its user may write: use --run-as or a higher level"
ROOT_ONLY = "at level process root stays root: use --run-as"


@probe("the source of the flow, in place", "VBB", run_as="BBB", why=SAME_USER)
def source_in_place(world: World) -> bool:
    return opens(world.script, os.O_WRONLY)


@probe("files next to the source, such as __pycache__", "VBB", run_as="BBB", why=SAME_USER)
def byte_code_next_to_the_source(world: World) -> bool:
    directory = os.path.join(os.path.dirname(world.script), "__pycache__")
    try:
        return creates(directory)
    except FileNotFoundError:
        os.mkdir(directory)
        return creates(directory)


@probe("a source in the cache", "VBB", run_as="BBB", why=SAME_USER)
def source_in_the_cache(world: World) -> bool:
    path = world.cached_source
    if os.stat(path).st_uid == os.getuid():
        os.chmod(path, 0o600)
    return opens(path, os.O_WRONLY)


@probe("the agent's database", "VBB", run_as="BBB", why=SAME_USER)
def database(world: World) -> bool:
    return opens(world.home + "/flowagent.db", os.O_WRONLY)


@probe("a new secret", "VBB", run_as="BBB", why=SAME_USER)
def secret(world: World) -> bool:
    return creates(world.home + "/secrets")


@probe("the modules that launchers import, and their byte code", "VBB", run_as="BBB", why=SAME_USER)
def ground(world: World) -> bool:
    return creates(world.ground + "/flowagent/runtime")


@probe("another run's directory", "VBB", run_as="BBB", why=SAME_USER)
def another_run(world: World) -> bool:
    return creates(world.victim_directory)


@probe("another run's files", "VBB", why=SAME_USER)
def files_of_another_run(world: World) -> bool:
    return creates(world.victim_directory + "/work")


@probe("site-packages of the interpreter", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def site_packages(world: World) -> bool:
    return creates(sysconfig.get_path("purelib"))


@probe("the standard library and its byte code", "BBB", root="VBB", run_as="BBB", why=ROOT_ONLY)
def standard_library(world: World) -> bool:
    creates(sysconfig.get_path("stdlib"))
    return opens(os.__file__, os.O_WRONLY)


@probe("start-up files of the user: ~/.bashrc, ~/.config", "VBB", run_as="BBB", why=SAME_USER)
def start_up_files(world: World) -> bool:
    return creates(world.user_home)


def _changes(world: World, path: str) -> bool:
    """Metadata of a file, each set to what it is; all are tried."""
    status = os.stat(path)
    changes = {
        "chmod": lambda: os.chmod(path, status.st_mode & 0o7777),
        "chown": lambda: os.chown(path, status.st_uid, status.st_gid),
        "utime": lambda: os.utime(path, (status.st_atime, status.st_mtime)),
        "setxattr": lambda: os.setxattr(path, "user.probe", b"1"),
        "truncate": lambda: os.truncate(path, status.st_size),
    }
    problem: OSError | None = None
    for change in changes.values():
        try:
            change()
            return True
        except OSError as error:
            problem = error
    assert problem is not None
    raise problem


@probe("mode, owner, times, attributes and length of the agent's files", "VBB", run_as="BBB", why=SAME_USER)
def metadata_of_the_agent(world: World) -> bool:
    return _changes(world, world.home + "/secrets/TOKEN")


@probe("mode, owner, times, attributes and length of another run's files", "VBB", why=SAME_USER)
def metadata_of_another_run(world: World) -> bool:
    return _changes(world, world.victim_directory + "/work/diary")


@probe("mode, owner, times and attributes of files of its user elsewhere", "VBB", run_as="BBB", why=SAME_USER)
def metadata_of_user_files(world: World) -> bool:
    return _changes(world, world.user_home + "/.bashrc")


@probe("removing and renaming files of others", "VBB", run_as="BBB", why=SAME_USER)
def removing(world: World) -> bool:
    path = world.home + "/results/of-another"
    os.rename(path, path + ".moved")
    os.rename(path + ".moved", path)
    return True


@probe("a hard link to a file of the agent", "VBB", run_as="BBB", why=SAME_USER)
def hard_link(world: World) -> bool:
    os.link(world.home + "/secrets/TOKEN", "hard")
    os.unlink("hard")
    return True


@probe(
    "files in /tmp and /var/tmp that stay behind",
    "VBB",
    why="at level process they are the machine's; higher levels close them, and TMPDIR is the run's own",
)
def shared_temporary(world: World) -> bool:
    return any([_stays(world, "/tmp"), _stays(world, "/var/tmp")])


def _stays(world: World, directory: str) -> bool:
    """Whether a file made there would be seen outside: there is none of the marks that are there outside."""
    try:
        return creates(directory) and os.path.exists(directory + "/mark-of-outside")
    except OSError:
        return False


@probe("files in /dev/shm that stay behind", "VBB", why="at level process it is the machine's")
def shared_memory_files(world: World) -> bool:
    return _stays(world, "/dev/shm")


@probe(
    "reading files next to what is closed, more of them than the agent may have descriptors",
    "AAA",
    why="everything but credentials and what is the agent's may be read",
)
def neighbours(world: World) -> bool:
    names = [name for name in os.listdir(world.user_home) if name.startswith("neighbour-")]
    return len(names) == 1200 and all(opens(f"{world.user_home}/{name}") for name in names)


def _leaves_program(bits: int) -> bool:
    """Whether a file gets these bits, by any of the calls that give a file its mode."""
    os.close(os.open("program", os.O_CREAT | os.O_WRONLY, 0o700))
    mode = 0o755 | bits
    opened = os.open("program", os.O_RDONLY)
    ways: dict[str, Callable[[], object]] = {
        "program": lambda: os.chmod("program", mode),
        "./program": lambda: os.chmod(opened, mode),
        "././program": lambda: os.chmod("program", mode, dir_fd=os.open(".", os.O_PATH)),
        "created": lambda: os.open("created", os.O_CREAT | os.O_WRONLY, mode),
        "made": lambda: os.mknod("made", mode | stat.S_IFREG),
        "unnamed": lambda: os.link(
            f"/proc/self/fd/{os.open('.', os.O_TMPFILE | os.O_WRONLY, mode)}", "unnamed"
        ),
    }
    problem: OSError | None = None
    for name, way in ways.items():
        try:
            way()
            if os.stat(name).st_mode & bits:
                return True
        except OSError as error:
            problem = error
    assert problem is not None
    raise problem


@probe("a program that runs as the flow's user, whoever starts it: setuid", "BBB")
def setuid(world: World) -> bool:
    return _leaves_program(stat.S_ISUID)


@probe("a program that runs as the flow's group: setgid", "BBB")
def setgid(world: World) -> bool:
    return _leaves_program(stat.S_ISGID)


@probe("its own directory, to work in", "AAA", why="that is what it is for")
def own_directory(world: World) -> bool:
    return creates(os.getcwd()) and creates(os.environ["TMPDIR"]) and creates(os.environ["HOME"])


@probe("its own /dev/shm, to compute with", "AAA", why="multiprocessing and the like need it")
def own_shared_memory(world: World) -> bool:
    return creates("/dev/shm")


@probe("a path that the operator allowed to be written", "AAA", why="--allow-write")
def allowed_path(world: World) -> bool:
    return creates(world.shared)


@probe(
    "/dev/stdout and /dev/stderr, opened anew",
    "AAA",
    why="a pipe to the supervisor: nothing in it can be cut",
)
def opening_stderr(world: World) -> bool:
    return all(opens(f"/dev/{name}", os.O_WRONLY | os.O_TRUNC) for name in ("stdout", "stderr"))
