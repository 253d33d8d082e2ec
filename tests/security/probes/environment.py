"""Variables that make programs execute or load something: whom they reach.

The flow is given them by ``run --env``, its run config's ``env`` and the agent's ``--env``, and names
files of its own making.
"""

from __future__ import annotations

import os
import subprocess
import sys

from . import World, agent, launcher, probe, supervisor

OWN = "it is the environment of the flow's own process and children"


@probe(
    "LD_PRELOAD, PYTHONSTARTUP, PYTHONPATH and BASH_ENV in its own children", "AAA", why=OWN, everywhere=False
)
def in_own_children(world: World) -> bool:
    code = "import poison_probe"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return "No module" not in done.stderr and os.environ.get("BASH_ENV") == world.poison + "/bash_env"


@probe("the same in the flow process itself, before the sandbox is applied", "BBB", everywhere=False)
def in_the_flow_process(world: World) -> bool:
    with open("/proc/self/maps") as maps:
        return world.poison in maps.read() or (
            "sitecustomize" in sys.modules
            and "poison" in str(getattr(sys.modules["sitecustomize"], "__file__", ""))
        )


@probe("the same in launcher, supervisor, bubblewrap and agent", "BBB", everywhere=False, outside=True)
def in_others(stage: World) -> bool:
    return bool(stage.unconfined_with(stage.world["poison"]))


@probe("variables of the agent, such as FLOWAGENT_SECRET_*", "BBB", everywhere=False)
def variables_of_the_agent(world: World) -> bool:
    return any(name.startswith(("FLOWAGENT_SECRET", "SSH_AUTH", "OUTSIDE")) for name in os.environ)


@probe("names that flowagent sets itself: HOME, TMPDIR, FLOWAGENT_RUN", "BBB", everywhere=False)
def names_of_flowagent(world: World) -> bool:
    return any("forged" in os.environ[name] for name in ("HOME", "TMPDIR", "FLOWAGENT_RUN"))


@probe("parameters, variables and secrets of earlier runs in its own memory", "BBB", everywhere=False)
def memory_of_earlier_runs(world: World) -> bool:
    """Supervisors are used again: what an earlier run was given must not be in what is forked of them."""
    needles = [bytes(reversed(text.encode())) for text in world.reversed_markers]
    assert len(needles) >= 3
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            area, rights, *_ = line.split()
            if not rights.startswith("rw") or line.rstrip().endswith(("[vvar]", "[vsyscall]")):
                continue
            low, high = (int(edge, 16) for edge in area.split("-"))
            memory.seek(low)
            try:
                content = memory.read(high - low)
            except OSError:
                continue
            for needle in needles:
                if content.count(needle) > (1 if low <= id(needle) < high else 0):
                    return True
    return False


@probe(
    "variables in the initial environment of the processes above it",
    "BBB",
    root="VBB",
    run_as="BBB",
    why="at level process root stays root: use --run-as",
)
def environment_above(world: World) -> bool:
    for find in (supervisor, launcher, agent):
        with open(f"/proc/{find()}/environ", "rb") as file:
            if file.read():
                return True
    return False
