"""Words of the agent and the supervisor, put into their mouths."""

from __future__ import annotations

import os

from . import World, opens, probe

OWN_RUN = "at level process a run can spoil what is noted of itself, and only that"
SAME_USER = "at level process the files are the user's: use --run-as or a higher level"


def _directory() -> str:
    return os.path.dirname(os.getcwd())


@probe("its own status, lease, stop, spec and outcome", "VBB", run_as="BBB", why=OWN_RUN)
def own_notes(world: World) -> bool:
    names = ("status", "lease", "spec.json", "outcome")
    reached = []
    for name in names:
        try:
            reached.append(opens(f"{_directory()}/{name}", os.O_WRONLY))
        except OSError as error:
            problem = error
    if not any(reached):
        raise problem
    return True


@probe("a request to stop, or another file, in its own run directory", "VBB", run_as="BBB", why=OWN_RUN)
def own_stop(world: World) -> bool:
    path = _directory() + "/stop.probe"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    os.unlink(path)
    return True


@probe("putting a link, FIFO or directory in place of its own output", "VBB", run_as="BBB", why=OWN_RUN)
def own_output(world: World) -> bool:
    path = _directory() + "/output"
    os.rename(path, path + ".probe")
    os.rename(path + ".probe", path)
    return True


@probe("events of another run: its output file", "VBB", run_as="BBB", why=SAME_USER)
def output_of_another_run(world: World) -> bool:
    return opens(world.victim_directory + "/output", os.O_WRONLY | os.O_APPEND)


@probe("end, lease or stop of another run", "VBB", run_as="BBB", why=SAME_USER)
def notes_of_another_run(world: World) -> bool:
    return opens(world.victim_directory + "/lease", os.O_WRONLY)
