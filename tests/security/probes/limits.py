"""More than a run may use. Each is a flow of its own with a limit in its run config."""

from __future__ import annotations

from . import World, probe

TMPFS = "without control groups, memory of files that exist in memory only is nobody's; use the systemd unit"


def _went_too_far(stage: World, flow: str) -> bool:
    return "too far" in stage.output(flow)


@probe("a fork bomb: processes", "BBB", everywhere=False, outside=True)
def fork_bomb(stage: World) -> bool:
    return _went_too_far(stage, "fork_bomb")


@probe("memory of many processes together", "BBB", everywhere=False, outside=True)
def memory_bomb(stage: World) -> bool:
    return _went_too_far(stage, "memory_bomb")


@probe(
    "memory as files in /dev/shm", "VBB", root="BBB", run_as="BBB", why=TMPFS, everywhere=False, outside=True
)
def shared_memory_bomb(stage: World) -> bool:
    return _went_too_far(stage, "shared_memory_bomb")


@probe("memory as files in /tmp", "VBB", root="BBB", run_as="BBB", why=TMPFS, everywhere=False, outside=True)
def tmp_bomb(stage: World) -> bool:
    return _went_too_far(stage, "tmp_bomb")


@probe("memory as memfd_create", "VVV", root="BBB", run_as="BBB", why=TMPFS, everywhere=False, outside=True)
def memfd_bomb(stage: World) -> bool:
    return _went_too_far(stage, "memfd_bomb")


@probe("disk: files in its directory", "BBB", everywhere=False, outside=True)
def disk_fill(stage: World) -> bool:
    return _went_too_far(stage, "disk_fill")


@probe("disk: files in a directory that it has closed", "BBB", everywhere=False, outside=True)
def hidden_disk_fill(stage: World) -> bool:
    return _went_too_far(stage, "hidden_disk_fill")


@probe(
    "disk: an open file without a name",
    "VVV",
    why="only a quota of the file system sees it; it is gone with the run",
    everywhere=False,
    outside=True,
)
def unlinked_disk_fill(stage: World) -> bool:
    return _went_too_far(stage, "unlinked_disk_fill")


@probe("a flood of output", "BBB", everywhere=False, outside=True)
def output_flood(stage: World) -> bool:
    return _went_too_far(stage, "output_flood")


@probe("descriptors", "BBB", everywhere=False, outside=True)
def descriptors(stage: World) -> bool:
    return _went_too_far(stage, "descriptors")


@probe(
    "fewer descriptors than confining it takes, for all that it does itself",
    "AAA",
    why="the limit is the flow's own, not its confinement's",
    everywhere=False,
    outside=True,
)
def few_descriptors(stage: World) -> bool:
    return "ran with few" in stage.output("frugal")


@probe("CPU time, of children in sessions of their own too", "BBB", everywhere=False, outside=True)
def cpu_burn(stage: World) -> bool:
    return _went_too_far(stage, "cpu_burn")


@probe("the size of a file", "BBB", everywhere=False, outside=True)
def large_file(stage: World) -> bool:
    return _went_too_far(stage, "large_file")


@probe("time, with SIGTERM ignored", "BBB", everywhere=False, outside=True)
def overtime(stage: World) -> bool:
    return _went_too_far(stage, "overtime")
