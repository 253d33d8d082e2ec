"""Local and Module as their documentation shows them, typed in, registered, and run by an agent."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from tests.e2e.harness import Site

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """All defaults: the home is ~/.flowagent of a user, and an agent is started in it."""
    root = tmp_path_factory.mktemp("storages")
    site = Site(root)
    site.home = root / ".flowagent"
    del site.environment["FLOWAGENT_HOME"]
    site.environment["HOME"] = str(root)
    (site.sources / "lib").mkdir()
    site.start("--import-path", str(site.sources / "lib"))
    yield site
    site.close()


def registered(site: Site, name: str) -> dict[str, Any]:
    with closing(sqlite3.connect(site.home / "flowagent.db", timeout=10)) as database:
        query = """SELECT v.spec FROM flow_version v JOIN flow f ON f.id = v.flow_id
                   WHERE f.name = ? ORDER BY v.id DESC LIMIT 1"""
        return dict(json.loads(database.execute(query, [name]).fetchone()[0]))


def results(site: Site, run: str) -> dict[str, Any]:
    """The values of a finished run, read from where its tasks say that they are kept."""
    found = {}
    for task in site.wait_for(run)["tasks"]:
        if task["result"]:
            path = Path(task["result"]["path"])
            assert site.home / "results" in path.parents
            found[task["task"]] = cloudpickle.loads(path.read_bytes())
    return found


# -- the examples, word for word but for the package's name, and the registration that they leave out ------

CONSTRUCTOR = """
from flowagent import Flow
from flowagent.storage import Local
# Set storage as part of the constructor
with Flow("example", storage=Local()) as flow:
    ...
"""
ATTRIBUTE = """
from flowagent import Flow
from flowagent.storage import Local
# OR set storage as an attribute later
with Flow("example") as flow:
    ...
flow.storage = Local()
"""
PRINT = """
from flowagent import Flow
# Top-level functionality (like this print statement) runs only at flow
# *registration* time, it will not run during each flow run. If you want
# something to run as part of a flow, you must write it as a task.
print("This print only runs at flow registration time")
with Flow("example") as flow:
    pass
"""
LOCAL = """
from flowagent import Flow
from flowagent.storage import Local
flow = Flow("local-flow", storage=Local())
"""
NO_LABELS = """
from flowagent import Flow
from flowagent.storage import Local
flow = Flow("local-flow", storage=Local(add_default_labels=False))
"""
MODULE = """
from flowagent import Flow
from flowagent.storage import Module
flow = Flow("module example", storage=Module("mymodule.flows"))
"""
THIS_MODULE = """
from flowagent import Flow
from flowagent.storage import Module
# Tip: you can use `__name__` to automatically reference the current module.
flow = Flow("module example", storage=Module(__name__))
"""
PERSON = """
from pathlib import Path
import flowagent
from flowagent import task, Flow
from flowagent.storage import Local
# get the path to the flow file using pathlib and __file__
# this path is dynamically populated when the flow is loaded from storage
file_path = Path(__file__).resolve().parent
# using our flow path, load the file
with open(str(file_path) + '/person.txt', 'r') as my_file:
    name = my_file.read()
@task
def say_hello(name):
    logger = flowagent.context.get("logger")
    logger.info(f"Hi {name}")
with Flow("my-hello-flow") as flow:
    say_hello(name)
# configure our flow to use `Local` storage
flow.storage = Local({arguments})
"""


@pytest.mark.parametrize("text", [CONSTRUCTOR, ATTRIBUTE, LOCAL], ids=["constructor", "attribute", "local"])
@pytest.mark.parametrize("how", ["flow.register()", "flowagent register"])
def test_local_storage(site: Site, text: str, how: str) -> None:
    directory = f"{how.split()[-1]}-{abs(hash(text))}"
    if how == "flow.register()":
        said = site.python(site.write(f"{directory}/flow.py", text + how + "\n")).stdout
    else:
        said = site.command("register", site.write(f"{directory}/flow.py", text)).stdout
    name = "local-flow" if text is LOCAL else "example"
    assert name in said
    site.watch(name)
    spec = registered(site, name)
    assert spec["labels"] == [HOST]
    stored = Path(spec["storage"]["path"])
    assert stored.parent == site.root / ".flowagent" / "flows" / name
    assert re.fullmatch(r"\d{4}-\d\d-\d\dt\d\d-\d\d-\d\d-\d{6}-00-00", stored.name)


def test_the_top_level_of_a_pickled_flow_runs_at_registration_only(site: Site) -> None:
    printed = "This print only runs at flow registration time"
    done = site.python(site.write("print/flow.py", PRINT + "flow.register()\n"))
    assert done.stdout.splitlines()[0] == printed
    assert registered(site, "example")["storage"]["type"] == "Local"
    assert printed not in site.watch("example")


def test_the_top_level_of_a_script_runs_at_each_run(site: Site) -> None:
    text = PRINT.replace('Flow("example")', 'Flow("as script", Local(stored_as_script=True))')
    script = site.write("print/script.py", "from flowagent.storage import Local\n" + text + "flow.register()")
    site.python(script)
    for _ in range(2):
        assert site.watch("as script").count("This print only runs at flow registration time") == 1


def test_an_agent_elsewhere_needs_add_default_labels_false(site: Site) -> None:
    site.command("register", site.write("labels/flow.py", LOCAL))
    site.command("register", site.write("labels/other.py", NO_LABELS.replace("local-flow", "any-agent")))
    assert registered(site, "any-agent")["labels"] == []
    # an agent that is not on this machine, as far as labels can tell, on a store of its own
    other = Site(site.root / "elsewhere")
    try:
        other.start("--no-hostname-label", "--labels", "elsewhere")
        other.command("register", site.sources / "labels/flow.py", site.sources / "labels/other.py")
        assert "completed" in other.watch("any-agent")
        refused = other.command("run", "local-flow").stderr
        assert f"lacks label {HOST}" in refused
    finally:
        other.close()


@pytest.mark.parametrize(
    ("text", "module"), [(MODULE, "mymodule.flows"), (THIS_MODULE, "thismodule.flows"), (MODULE, None)]
)
def test_module_storage(site: Site, text: str, module: str | None) -> None:
    reference = module or "attribute.flows:flows.first"
    name = reference.partition(":")[0]
    body = """
        from flowagent import task
        @task
        def where():
            print("from", __name__, __file__)
        with flow:
            where()
        flow.name = flow.name + " in " + __name__
    """
    text = text.replace("mymodule.flows", reference) + textwrap.dedent(body)
    if module is None:
        text += "class flows:\n    first = flow\n"
        text = text.replace("flow.name = ", "if True: flow.name = ")
    path = f"lib/{name.replace('.', '/')}.py"
    site.write(path, text)
    site.write(f"lib/{name.partition('.')[0]}/__init__.py", "")
    site.command("register", "-m", reference, cwd=site.sources / "lib")
    flow_name = f"module example in {name}"
    assert registered(site, flow_name)["storage"]["module"] == reference
    assert registered(site, flow_name)["labels"] == []
    assert f"from {name} {site.sources / path}" in site.watch(flow_name)


def test_module_registers_itself_by_its_name(site: Site) -> None:
    text = THIS_MODULE.replace("module example", "imported") + "flow.register()\n"
    site.write("lib/imported.py", text)
    starter = site.write("lib/start.py", "import imported\n")
    site.python(starter, cwd=site.sources / "lib")
    site.watch("imported")
    catching = text.replace(
        "flow.register()", "try:\n    flow.register()\nexcept Exception as error:\n    print(error)"
    )
    main = site.python(site.write("lib/main.py", catching))
    assert "give the importable name, like Module('pkg.flows')" in main.stdout


# -- files beside the flow -----------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "seen"), [("", "Hi Marvin"), ("stored_as_script=True", "Hi Zaphod")])
def test_the_person_of_the_documentation(site: Site, arguments: str, seen: str) -> None:
    site.write("person/person.txt", "Marvin")
    text = PERSON.replace("{arguments}", arguments) + 'flow.register(project_name="tutorial")\n'
    site.python(site.write("person/flow.py", text))
    site.write("person/person.txt", "Zaphod")
    assert seen in site.watch("my-hello-flow")


@pytest.mark.parametrize("storage", ["Local()", "Local(stored_as_script=True)"])
def test_side_files_are_there_while_tasks_run(site: Site, storage: str) -> None:
    """A file read in a task, not only at the top level; what `__file__` says is true (defects 5 and 9)."""
    directory = "side-" + ("script" if "script" in storage else "pickle")
    site.write(f"{directory}/data/greeting.txt", "good morning")
    text = f"""
        from pathlib import Path
        from flowagent import Flow, task
        from flowagent.storage import Local

        @task
        def read():
            print(__file__, "says", (Path(__file__).parent / "data" / "greeting.txt").read_text())

        with Flow("{directory}", {storage}) as flow:
            read()
    """
    script = site.write(f"{directory}/flow.py", text)
    site.command("register", script)
    assert f"{script} says good morning" in site.watch(directory)


# -- scripts and pickles -------------------------------------------------------------------------------

EDITED = """
    from flowagent import Flow, task
    from flowagent.storage import Local
    from helpers import suffix

    @task
    def answer():
        return "as registered" + suffix()

    with Flow("NAME", STORAGE) as flow:
        answer()
"""


@pytest.mark.parametrize(
    ("name", "storage", "expected"),
    [
        ("frozen", "Local()", "as registered!"),
        ("edited", "Local(stored_as_script=True)", "as edited!?"),
        ("by default", "None", "as edited!?"),
    ],
)
def test_edits_reach_scripts_and_not_pickles(site: Site, name: str, storage: str, expected: str) -> None:
    """Also: a module beside the script is found at registration and at run time (defect 8), and the default
    result, which only the registration knows, keeps values of scripts and pickles alike (defect 11)."""
    directory = name.replace(" ", "-")
    text = EDITED.replace("NAME", name).replace("STORAGE", storage)
    helper = site.write(f"{directory}/helpers.py", "def suffix():\n    return '!'\n")
    script = site.write(f"{directory}/flow.py", text)
    site.command("register", script)
    assert results(site, site.submit(name)) == {"answer-1": "as registered!"}
    script.write_text(script.read_text().replace("as registered", "as edited"))
    helper.write_text(helper.read_text().replace("!", "!?"))
    assert results(site, site.submit(name)) == {"answer-1": expected}


def test_a_pickle_needs_neither_script_nor_helper(site: Site) -> None:
    text = EDITED.replace("NAME", "alone").replace("STORAGE", "Local()")
    helper = site.write("alone/helpers.py", "def suffix():\n    return '!'\n")
    script = site.write("alone/flow.py", text)
    site.command("register", script)
    helper.unlink()
    script.unlink()
    assert results(site, site.submit("alone")) == {"answer-1": "as registered!"}


def test_registering_a_pickle_again_is_no_new_version(site: Site) -> None:
    """Defect 12: the timestamp in the location made every registration a version. Nor is it one to register
    by command what registered itself, where the script was `__main__`."""
    text = EDITED.replace("NAME", "stable").replace("STORAGE", "Local()")
    site.write("stable/helpers.py", "def suffix():\n    return '!'\n")
    script = site.write("stable/flow.py", text + "\n    flow.register()\n")
    said = [site.python(script).stdout, site.python(script).stdout, site.command("register", script).stdout]
    assert "version 1" in said[0]
    assert all("stable is unchanged: version 1" in text for text in said[1:])
    assert len(list((site.home / "flows" / "stable").iterdir())) == 1


def test_a_module_has_its_name_and_a_traceback_its_lines(site: Site) -> None:
    """Defect 10: `__name__` was builtins, and tracebacks named the file <string>."""
    text = """
        import sys
        from flowagent import Flow, task

        if __name__ == "__main__":
            raise SystemExit("not for agents")

        @task
        def fail():
            assert sys.modules[__name__].fail is fail
            raise LookupError(__name__ + " is a module")

        with Flow("tracing") as flow:
            fail()
    """
    script = site.write("tracing/my flow.py", text)
    site.command("register", script)
    output = site.watch("tracing", code=1)
    assert f'File "{script}", line 11, in fail' in output
    assert 'raise LookupError(__name__ + " is a module")' in output
    assert re.search(r"task fail-1 failed: LookupError: _flow_my_flow_\w+ is a module", output)


def test_a_missing_file_is_named_as_a_file(site: Site) -> None:
    """Defect 26: it was reported as a missing module."""
    script = site.write("gone/flow.py", LOCAL.replace("Local()", "Local(stored_as_script=True)"))
    script.write_text(script.read_text().replace("local-flow", "gone"))
    site.command("register", script)
    script.unlink()
    output = site.watch("gone", code=3)
    assert f"no file {script} on {HOST}" in output
    assert "module" not in output


def test_equal_names_in_one_file_are_refused(site: Site) -> None:
    """Defect 27: the last one won."""
    text = LOCAL.replace("local-flow", "once").replace("Local()", "Local(stored_as_script=True)")
    script = site.write("twice/flow.py", text)
    site.command("register", script)
    script.write_text(text + text.replace("flow =", "other ="))
    refused = site.command("register", script, code=1)
    assert "several flows named 'once'" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert "several flows named 'once'" in site.watch("once", code=1)


def test_a_tampered_pickle_is_refused_before_it_is_read(site: Site) -> None:
    script = site.write("tampered/flow.py", CONSTRUCTOR.replace('"example"', '"tampered"'))
    site.command("register", script)
    stored = Path(registered(site, "tampered")["storage"]["path"])
    mark = site.root / "executed"
    stored.write_bytes(f"cpathlib\nPath\n(S'{mark}'\ntR.".encode() + stored.read_bytes())
    output = site.watch("tampered", code=3)
    assert "it was changed since: register the flow again" in output
    assert not mark.exists()
    assert "registered" in site.command("register", script).stdout
    site.watch("tampered")


def test_a_pickle_that_misses_a_module_names_it(site: Site) -> None:
    site.write("site-packages/onlyhere.py", "class Thing:\n    pass\n")
    text = """
        import onlyhere
        from flowagent import Flow, task
        from flowagent.storage import Local

        @task
        def use(thing):
            print(thing)

        with Flow("needs a module", Local()) as flow:
            use(onlyhere.Thing())
    """
    script = site.write("needs/flow.py", text)
    elsewhere = {"PYTHONPATH": str(site.sources / "site-packages")}
    site.command("register", script, env=elsewhere)
    output = site.watch("needs a module", code=1)
    assert "ModuleNotFoundError: No module named 'onlyhere'; install the module 'onlyhere' here" in output
