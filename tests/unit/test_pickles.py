"""Flows as pickles: what goes along, what the fingerprint sees, and what a failed load says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowagent import Flow, FlowError, task
from flowagent.flows import pickles
from flowagent.flows.errors import FlowLoadError
from flowagent.flows.observer import Observer
from flowagent.storage import Local

AGENT = str(Path(pickles.__file__).parents[2])

HELPER = """
import threading
OFFSET = 100
def shifted(x):
    return x + OFFSET
class Shape:
    sides = {"a", "b", "c", "dd", "eee"}
    def area(self):
        self.first, self.second, self.third = 1, 2, 3
        return self.first
"""

SCRIPT = """
import json
import helper
import math
from helper import shifted, Shape
from flowagent import Flow, Parameter, Secret, Task, task, context, get_logger, unmapped

LIMIT = 10
ALLOWED = {"red", "green", "blue", "yellow", "black"}
logger = get_logger()

def closure(factor):
    def scaled(x):
        if x in {"one", "two", "three", "four"}:
            return 0
        return x * factor
    return scaled

class Add(Task):
    def __init__(self, amount=1, **kwargs):
        self.amount = amount
        super().__init__(**kwargs)
    def run(self, x):
        return Shape().area() + x + self.amount

@task(max_retries=2, tags=["b", "a"])
def load(n, unit="m"):
    logger.info("loading")
    assert "red" in ALLOWED
    return min(n, LIMIT) + len(ALLOWED)

@task
def send(x, options=None):
    return helper.shifted(shifted(x))

scale = task(closure(2), name="scale")
with Flow("etl") as flow:
    n = Parameter("n", default=3)
    a = load(n)
    b = Add(2)(a)
    c = scale(b)
    d = send(c, options={"k": [a, b]})
"""

DRIVER = """
import importlib.util, json, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
spec = importlib.util.spec_from_file_location("flow_under_test", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["flow_under_test"] = module
spec.loader.exec_module(module)
from flowagent.flows import pickles
made = pickles.dump(module.flow, Path(sys.argv[1]).parent)
if len(sys.argv) > 2:
    Path(sys.argv[2]).write_bytes(made.data)
print(json.dumps([made.fingerprint, made.sha256, made.made_with]))
"""


def interpreters() -> list[str]:
    return [python for python in os.environ.get("FLOWAGENT_TEST_PYTHONS", "").split(":") if python] or [
        sys.executable
    ]


def run_python(code: str, *arguments: str, seed: str = "0", python: str = sys.executable) -> Any:
    """The JSON that a fresh interpreter prints."""
    import cloudpickle

    path = [AGENT] if python == sys.executable else [AGENT, str(Path(cloudpickle.__file__).parents[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [python, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def written(directory: Path, script: str = SCRIPT, helper: str = HELPER) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "helper.py").write_text(helper)
    (directory / "flow.py").write_text(script)
    return directory / "flow.py"


def fingerprint_of(path: Path, *, seed: str = "0", python: str = sys.executable) -> str:
    found: str = run_python(DRIVER, str(path), seed=seed, python=python)[0]
    return found


@pytest.mark.parametrize("python", interpreters())
def test_the_fingerprint_is_equal_in_every_process(tmp_path: Path, python: str) -> None:
    path = written(tmp_path)
    # the first one compiles the helper, the others load it from its .pyc file
    assert len({fingerprint_of(path, seed=seed, python=python) for seed in "0123"}) == 1


def test_the_bytes_differ_where_the_fingerprint_does_not(tmp_path: Path) -> None:
    path = written(tmp_path)
    answers = [run_python(DRIVER, str(path), seed=seed) for seed in "01"]
    assert answers[0][1] != answers[1][1]
    assert answers[0][0] == answers[1][0]


CHANGES = {
    "body of a task": ("min(n, LIMIT)", "max(n, LIMIT)"),
    "default of a task": ('unit="m"', 'unit="km"'),
    "a constant in a set": ('"four"}', '"five"}'),
    "a global": ("LIMIT = 10", "LIMIT = 11"),
    "a global set": ('"black"}', '"white"}'),
    "a closure": ("closure(2)", "closure(3)"),
    "an attribute of a task": ("Add(2)", "Add(3)"),
    "a method of a task class": ("+ x + self.amount", "- x + self.amount"),
    "retries": ("max_retries=2", "max_retries=3"),
    "a tag": ('"b", "a"', '"b", "c"'),
    "a name": ('name="scale"', 'name="scaled"'),
    "the flow's name": ('Flow("etl")', 'Flow("elt")'),
    "an edge": ("c = scale(b)", "c = scale(a)"),
    "a nested argument": ('"k": [a, b]', '"k": [b, a]'),
    "one task more": ("d = send", "e = load(n); d = send"),
    "a default of a parameter": ("default=3", "default=4"),
    "a decorated function's other name": ("def load(n, unit", "def load(n, unity"),
    "type of a constant": ("x * factor", "x * factor * 1.0"),
}


def test_every_change_changes_the_fingerprint(tmp_path: Path) -> None:
    scripts = {"nothing": (SCRIPT, HELPER)}
    for what, (old, new) in CHANGES.items():
        assert SCRIPT.count(old) == 1, what
        scripts[what] = (SCRIPT.replace(old, new), HELPER)
    scripts["a helper's global"] = (SCRIPT, HELPER.replace("100", "101"))
    scripts["a helper's class"] = (SCRIPT, HELPER.replace("return self.first", "return self.second"))
    scripts["a helper's set"] = (SCRIPT, HELPER.replace('"eee"', '"eef"'))
    # all in one process, one after the other, at the same path
    code = """
import importlib, json, sys
sys.dont_write_bytecode = True
from pathlib import Path
from flowagent.flows import pickles
root = Path(sys.argv[1])
sys.path.insert(0, str(root))
found = {}
for what, (script, helper) in json.loads((root / "scripts.json").read_text()).items():
    (root / "helper.py").write_text(helper)
    sys.modules.pop("helper", None)
    importlib.invalidate_caches()
    module = type(sys)("flow_under_test")
    module.__file__ = str(root / "flow.py")
    sys.modules["flow_under_test"] = module
    exec(compile(script, module.__file__, "exec"), vars(module))
    found[what] = pickles.dump(module.flow, root).fingerprint
print(json.dumps(found))
"""
    (tmp_path / "scripts.json").write_text(json.dumps(scripts))
    found = run_python(code, str(tmp_path))
    assert len(found) == len(scripts)
    owners: dict[str, str] = {}
    for what, print_ in found.items():
        assert print_ not in owners, f"{what} and {owners[print_]} have one fingerprint"
        owners[print_] = what


@pytest.mark.parametrize("python", interpreters())
def test_a_helper_beside_the_script_goes_along(tmp_path: Path, python: str) -> None:
    path = written(tmp_path / "project")
    _, sha256, made_with = run_python(DRIVER, str(path), str(tmp_path / "pickle"), python=python)
    code = """
import json, sys
from pathlib import Path
from flowagent.flows import pickles
from flowagent.flows.observer import Observer
flow = pickles.load(Path(sys.argv[1]).read_bytes(), sys.argv[2], json.loads(sys.argv[3]))
assert "helper" not in sys.modules
state = flow.execute({"n": 4}, Observer())
print(json.dumps([state.message, [s.result for t, s in state.result.items() if t.name == "send"]]))
"""
    for name in ("helper.py", "flow.py"):
        (tmp_path / "project" / name).unlink()
    message, values = run_python(code, str(tmp_path / "pickle"), sha256, json.dumps(made_with), python=python)
    assert message is None
    assert values == [(1 + (4 + 5) + 2) * 2 + 200]


def test_storage_and_run_config_are_not_part_of_the_content(tmp_path: Path) -> None:
    @task
    def one() -> int:
        return 1

    with Flow("etl") as flow:
        one()
    before = pickles.dump(flow)
    flow.storage = Local(tmp_path)
    flow.labels = ("a",)
    after = pickles.dump(flow)
    assert after.fingerprint == before.fingerprint
    assert flow.storage == Local(tmp_path)
    loaded = pickles.load(after.data, after.sha256, after.made_with)
    assert loaded.storage is None
    assert not loaded.execute({}, Observer()).is_failed()


def test_other_bytes_are_refused_before_they_are_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    import pickle

    data = pickle.dumps(Evil())
    with pytest.raises(FlowLoadError, match=r"registered sha256 0000, found [0-9a-f]{64}"):
        pickles.load(data, "0000", {})
    assert not (tmp_path / "executed").exists()


def test_a_failed_load_names_versions_and_the_missing_module() -> None:
    made_with = {**pickles.versions(), "cloudpickle": "0.0.1"}
    with pytest.raises(FlowLoadError) as caught:
        pickles.load(b"cno_such_module\nthing\n.", None, made_with)
    message = str(caught.value)
    assert "ModuleNotFoundError" in message
    assert "install the module 'no_such_module'" in message
    assert f"(made with cloudpickle 0.0.1, running {pickles.versions()['cloudpickle']})" in message
    assert "\n" not in message


def test_another_minor_version_of_python_is_refused() -> None:
    with pytest.raises(FlowLoadError, match=r"\(made with Python 3.8.1, running "):
        pickles.load(b"", None, {"python": "3.8.1"})


def test_what_cannot_be_pickled_is_said_in_one_line() -> None:
    import threading

    lock = threading.Lock()

    @task
    def locked() -> bool:
        return lock.locked()

    with Flow("etl") as flow:
        locked()
    with pytest.raises(FlowError, match=r"flow 'etl' cannot be pickled: TypeError.*lock.*stored_as_script"):
        pickles.dump(flow)


def test_pickling_by_value_is_undone(tmp_path: Path) -> None:
    import cloudpickle

    with Flow("etl") as flow:
        pass
    before = cloudpickle.list_registry_pickle_by_value()
    pickles.dump(flow, Path(__file__).parent)
    assert cloudpickle.list_registry_pickle_by_value() == before


def test_an_unknown_opcode_makes_it_unstable_and_never_equal() -> None:
    from flowagent.flows.fingerprints import fingerprint

    assert fingerprint(b"I1\n.") != fingerprint(b"I2\n.")
    assert fingerprint(b"garbage") != fingerprint(b"garbagf")
