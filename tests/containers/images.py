"""Base images out of this machine's own files, as no registry is asked: one with Python, one without."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flowagent
import flowagent_backends

PYTHON = "/usr/bin/python3.11"
BUSYBOX = "/bin/busybox"
TOOLS = (
    "sh",
    "cat",
    "env",
    "sleep",
    "ls",
    "id",
    "mkdir",
    "rm",
    "dd",
    "kill",
    "ps",
    "test",
    "true",
    "wget",
    "chmod",
    "chown",
    "echo",
)
LEFT_OUT = (
    "test",
    "idlelib",
    "tkinter",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "__pycache__",
    "pydoc_data",
    "site-packages",
)
OF_WHEELS = ("libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1")
"""Libraries that binaries from a package index expect everywhere."""
PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\nflow:x:1000:1000::/home/flow:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"
)
GROUP = "root:x:0:\nflow:x:1000:\nnogroup:x:65534:\n"


def _libraries(paths: list[Path]) -> Iterator[Path]:
    """Shared libraries that programs need, the loader and those for names of users and hosts with them."""
    found = subprocess.run(["ldd", *map(str, paths)], capture_output=True, text=True).stdout
    names = set(re.findall(r"(/\S+\.so\S*)", found))
    for directory in ("/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu"):
        for pattern in ("libnss_*.so.2", *OF_WHEELS):
            names |= {str(path) for path in Path(directory).glob(pattern)}
            names |= {str(path) for path in Path("/usr" + directory).glob(pattern)}
    return (Path(name) for name in sorted(names) if not name.endswith(":"))


def _text(tar: tarfile.TarFile, name: str, text: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(text), 0o644
    tar.addfile(entry, io.BytesIO(text.encode()))


def _directory(tar: tarfile.TarFile, name: str, mode: int = 0o755) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    tar.addfile(entry)


def _link(tar: tarfile.TarFile, name: str, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    tar.addfile(entry)


def _copy(tar: tarfile.TarFile, path: Path, name: str | None = None) -> None:
    tar.add(path.resolve(), name or str(path).lstrip("/"), recursive=False)


def _files_of(library: Path) -> Iterator[Path]:
    """The files of a standard library but those that no flow needs."""
    for file in sorted(library.rglob("*")):
        left_out = set(file.relative_to(library).parts) & set(LEFT_OUT) or file.suffix == ".a"
        if file.is_file() and not left_out:
            yield file


def _system(tar: tarfile.TarFile) -> None:
    for name, mode in (
        ("root", 0o700),
        ("home/flow", 0o755),
        ("tmp", 0o1777),
        ("etc", 0o755),
        ("bin", 0o755),
    ):
        _directory(tar, name, mode)
    _text(tar, "etc/passwd", PASSWD)
    _text(tar, "etc/group", GROUP)
    _copy(tar, Path(BUSYBOX), "bin/busybox")
    for tool in TOOLS:
        _link(tar, f"bin/{tool}", "busybox")


def without_python(path: Path) -> None:
    """Write a tar of an image that holds nothing but a shell."""
    with tarfile.open(path, "w", dereference=True) as tar:
        _system(tar)


def with_python(path: Path, *more: Path) -> None:
    """Write a tar of an image with this machine's Python, and programs besides."""
    library = Path("/usr/lib/python3.11")
    programs = [Path(PYTHON), *more]
    with tarfile.open(path, "w", dereference=True) as tar:
        _system(tar)
        for program in programs:
            _copy(tar, program)
        _link(tar, "usr/bin/python3", "python3.11")
        for file in _files_of(library):
            _copy(tar, file)
        extensions = sorted((library / "lib-dynload").glob("*.so"))
        for file in _libraries([*programs, *extensions]):
            _copy(tar, file)


def with_another(path: Path, interpreter: Path) -> None:
    """Write a tar of an image whose Python is another one of this machine's, where it is here."""
    ask = "import sys, sysconfig; print(sys.executable, sysconfig.get_path('stdlib'))"
    said = subprocess.run([interpreter, "-c", ask], capture_output=True, text=True, check=True).stdout
    program, library = map(Path, said.split())
    unpacked = interpreter.parent / "root"  # see tests/interpreters
    files = {interpreter, program, *_files_of(unpacked if unpacked.is_dir() else library)}
    files |= set(_libraries([program, *library.glob("lib-dynload/*.so")]))
    with tarfile.open(path, "w", dereference=True) as tar:
        _system(tar)
        _link(tar, "usr/bin/python3", str(interpreter))
        for file in sorted(filter(Path.is_file, files)):
            _copy(tar, file)


def with_pip(path: Path, pip: Path) -> None:
    """Write a tar of an image that has git and pip, too: the package in the directory ``pip``."""
    with_python(path, Path("/usr/bin/git"))
    with tarfile.open(path, "a", dereference=True) as tar:
        tar.add(pip, "usr/lib/python3/dist-packages/pip")


def with_flowagent(path: Path) -> None:
    """Write a tar of an image that has git, and flowagent with all that it depends on, as it is here."""
    with_python(path, Path("/usr/bin/git"))
    packages = "usr/lib/python3/dist-packages"
    with tarfile.open(path, "a", dereference=True) as tar:
        for name in sorted(_needed("flowagent")):
            distribution = metadata.distribution(name)
            for file in distribution.files or ():
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    tar.add(str(distribution.locate_file(file)), f"{packages}/{file}", recursive=False)
        for package in (flowagent, flowagent_backends):
            directory = Path(package.__path__[0])
            for source in directory.rglob("*.py"):
                tar.add(source, f"{packages}/{source.relative_to(directory.parent)}")
        entry = tarfile.TarInfo("usr/bin/flowagent")
        text = b"#!/usr/bin/python3\nimport sys\nfrom flowagent.cli import main\nsys.exit(main())\n"
        entry.size, entry.mode = len(text), 0o755
        tar.addfile(entry, io.BytesIO(text))


def _needed(name: str, found: set[str] | None = None) -> set[str]:
    """A distribution and those that it cannot do without."""
    found = set() if found is None else found
    if (name := canonicalize_name(name)) not in found:
        found.add(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                _needed(requirement.name, found)
    return found


def with_old(path: Path) -> None:
    """Write a tar of an image whose Python is too old: as far as anybody can tell who asks it."""
    with tarfile.open(path, "w", dereference=True) as tar:
        _system(tar)
        entry = tarfile.TarInfo("bin/python3")
        text = b"#!/bin/sh\necho '{\"python\": [3, 6, 8]}'\n"
        entry.size, entry.mode = len(text), 0o755
        tar.addfile(entry, io.BytesIO(text))
