"""The ground floor as a launcher sees it: a copy of the stdlib-only modules and cloudpickle.

A launcher of any interpreter has this directory, and nothing else of the agent, on its import path. It is
laid out once per content, so an upgraded agent brings its launchers a new one and disturbs no old one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import flowagent
from flowagent.errors import LauncherError

FLOOR = ("__init__.py", "storage", "run_configs.py", "results.py", "triggers.py", "flows", "runtime")
ENTRY = "launch.py"
IN_IMAGES = "/opt/flowagent/ground"
"""Where it is in images that were built with a flow in them."""
_ENTRY_TEXT = """\
import sys

if sys.argv[1] == "--flow":
    from flowagent.runtime.child import run_inside

    run_inside(sys.argv[2:])
elif sys.argv[1] == "--check":
    from flowagent.runtime.check import main

    main(sys.argv[2:])
elif sys.argv[1] == "--container":
    from flowagent.runtime.container import main

    main()
else:
    from flowagent.runtime import warmth

    warmth.hold_fork_handlers()
    from flowagent.runtime.launcher import main

    main(sys.argv[1:])
"""


def contents() -> dict[str, bytes]:
    """The ground floor as files, by their relative names."""
    return {**{name: path.read_bytes() for name, path in _files().items()}, ENTRY: _ENTRY_TEXT.encode()}


def lay_out(root: Path) -> Path:
    """The directory under ``root`` that holds the ground floor of this version, made if it is missing.

    :raises LauncherError: it cannot be written."""
    files = _files()
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    target = root / digest.hexdigest()[:16]
    if target.is_dir():
        return target
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=root))
        try:
            for name, source in files.items():
                copy = temporary / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
            (temporary / ENTRY).write_text(_ENTRY_TEXT)
            for path in (temporary, *temporary.rglob("*")):  # flows may run as another user
                path.chmod(0o755 if path.is_dir() else 0o644)
            os.rename(temporary, target)
        except FileExistsError:
            pass  # another agent was faster
        except OSError as error:
            if not target.is_dir():
                raise error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise LauncherError(f"cannot lay out the launcher's modules in {root}: {error.strerror}") from error
    return target


def _files() -> dict[str, Path]:
    """Relative name -> file, of everything that belongs to the ground floor."""
    package = Path(flowagent.__file__).parent
    found: dict[str, Path] = {}
    for name in FLOOR:
        path = package / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found[f"flowagent/{file.relative_to(package)}"] = file
    spec = find_spec("cloudpickle")
    if spec is not None and spec.origin is not None:
        directory = Path(spec.origin).parent
        for file in directory.rglob("*.py"):
            found[f"cloudpickle/{file.relative_to(directory)}"] = file
    return found
