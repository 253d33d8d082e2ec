"""Living on, or leaving something, when the run is over. Looked at from outside."""

from __future__ import annotations

from . import World, probe


@probe(
    "a daemon: double fork, new session, no environment, SIGTERM ignored",
    "BBB",
    everywhere=False,
    outside=True,
)
def daemon(stage: World) -> bool:
    return stage.lives_on("daemon", "fa-daemon")


@probe("a daemon that forks itself anew all the time", "BBB", everywhere=False, outside=True)
def reforker(stage: World) -> bool:
    return stage.lives_on("reforker", "fa-reforker")


@probe("a swarm of such daemons", "BBB", everywhere=False, outside=True)
def swarm(stage: World) -> bool:
    return stage.lives_on("swarm", "fa-swarm")


@probe("mounts left behind", "BBB", everywhere=False, outside=True)
def mounts(stage: World) -> bool:
    stage.output("mounter")
    return bool(stage.new_mounts())


@probe(
    "its run directory left behind, whatever modes it gave to what is in it",
    "BBB",
    everywhere=False,
    outside=True,
)
def run_directory(stage: World) -> bool:
    return stage.has_directory_of("hidden_disk_fill")
