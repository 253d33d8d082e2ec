"""What a flow asks for in its registration, which its author writes: more than its agent gives."""

from __future__ import annotations

from . import World, probe


def _refused(stage: World, flow: str, reason: str) -> bool:
    """Reached, unless it was refused with the reason."""
    shown = stage.ended(flow)
    return not (shown["state"] in ("crashed", "failed") and reason in str(shown["reason"]))


@probe("a level below the agent's", "BBB", everywhere=False, outside=True)
def lower_level(stage: World) -> bool:
    return bool(stage.ended("humble")["sandbox"] != stage.level)


@probe("a path to write that the operator has not allowed", "BBB", everywhere=False, outside=True)
def path_to_write(stage: World) -> bool:
    return _refused(stage, "greedy", "which this agent does not allow")


@probe(
    "a path to write that leads out of an allowed one by a symbolic link",
    "BBB",
    everywhere=False,
    outside=True,
)
def path_by_link(stage: World) -> bool:
    return _refused(stage, "roundabout", "which this agent does not allow")


@probe(
    "an interpreter next to the flow's own script on the agent's machine, which its user alone can write",
    "AAA",
    why="a virtual environment in a project; whoever put it there is the agent's user",
    everywhere=False,
    outside=True,
)
def interpreter_in_the_source(stage: World) -> bool:
    return _refused(stage, "python_in_source", "interpreter")


@probe(
    "an interpreter in the agent's home, where sources of flows are", "BBB", everywhere=False, outside=True
)
def interpreter_in_the_home(stage: World) -> bool:
    return _refused(stage, "python_in_home", "interpreter")


@probe(
    "a virtual environment that flows may write, around a good interpreter",
    "BBB",
    everywhere=False,
    outside=True,
)
def interpreter_in_an_allowed_path(stage: World) -> bool:
    return _refused(stage, "python_in_shared", "interpreter")


@probe("an interpreter in a directory that others may write", "BBB", everywhere=False, outside=True)
def interpreter_of_others(stage: World) -> bool:
    return _refused(stage, "python_of_others", "interpreter")


@probe("a module of the flow's to preload", "BBB", everywhere=False, outside=True)
def module_to_preload(stage: World) -> bool:
    return _refused(stage, "hostile_preload", "hostile_module")


@probe(
    "a result to be written outside of the results, by its declaration", "BBB", everywhere=False, outside=True
)
def result_anywhere(stage: World) -> bool:
    stage.ended("misplaced")
    return stage.exists(stage.world["user_home"] + "/forged-by-declaration")


@probe(
    "a result that is a link, a FIFO, or to be elsewhere, by an event", "BBB", everywhere=False, outside=True
)
def results_that_are_none(stage: World) -> bool:
    stage.ended("cheat")
    forged = stage.files_named("forged-result", "FORGED")
    copies = stage.files_with(b"t0ken-of-the-agent")
    return bool(forged or set(copies) - {stage.world["home"][1:] + "/secrets/TOKEN"})


@probe("the state of another run, by events and by notes", "BBB", everywhere=False, outside=True)
def state_of_another_run(stage: World) -> bool:
    stage.ended("forger")
    return bool(stage.state("victim") != "running")


@probe("a pickle other than the one that was registered", "BBB", everywhere=False, outside=True)
def other_pickle(stage: World) -> bool:
    shown = stage.ended("pickled")
    return not (shown["state"] == "crashed" and "digest" in str(shown["reason"])) or stage.exists(
        stage.world["shared"] + "/unpickled"
    )


@probe(
    "code that is executed by loading a pickle: as confined as the flow",
    "BBB",
    everywhere=False,
    outside=True,
)
def pickle_with_code(stage: World) -> bool:
    words = stage.output("explosive").split()
    assert "NoNewPrivs:" in words, (stage.ended("explosive"), words)
    return words[words.index("NoNewPrivs:") + 1] != "1" or words[words.index("Seccomp:") + 1] != "2"
