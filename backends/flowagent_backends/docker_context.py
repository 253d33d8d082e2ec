"""What an image is built from: the Dockerfile, the flow, what runs it, and the files that go with it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from flowagent import ground
from flowagent.backend import Artifact
from flowagent.docker import parse
from flowagent.errors import BackendError, UsageError
from flowagent.flows.names import slug
from flowagent.models import Json

HOME = "/opt/flowagent"
FLOWS = f"{HOME}/flows"
"""Where flows are in images."""
PREFIX = ".flowagent-"
"""Of the names in a context that are ours."""
LINK_OR_NOTHING = "is neither a file nor a directory; correct files="
_CONTINUED = re.compile(r"\\[ \t]*\n")
_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)(?::(?P<sign>[-+])(?P<other>[^}]*))?\}|(?P<plain>\w+))")


@dataclass
class Context:
    """One build. ``digest`` is of all that goes in besides flow and runtime; ``bases``: its images."""

    storage: Mapping[str, Json]
    bases: Sequence[str]
    digest: str
    flow_path: str = ""
    flow_sha256: str | None = None
    flow_name: str = ""
    kind: str = ""
    flow: bytes | None = None
    made_with: Mapping[str, str] = field(default_factory=dict)
    dockerfile_name: str = PREFIX + "Dockerfile"

    @classmethod
    def outside_of_flow(cls, storage: Mapping[str, Json]) -> Context:
        """All but the flow. :raises BackendError: a file is not there."""
        digest = hashlib.sha256()
        paths = sorted(storage.get("files") or {})
        for path in filter(None, (storage.get("dockerfile"), storage.get("dockerignore"), *paths)):
            for file in _files(Path(path)):
                digest.update(f"{path}\0{file.relative_to(path)}\0".encode(errors="surrogateescape"))
                digest.update(hashlib.sha256(file.read_bytes()).digest())
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        bases = [storage.get("base_image") or f"python:{version}-slim"]
        if storage.get("dockerfile"):
            bases = _bases(
                Path(storage["dockerfile"]), (storage.get("build_kwargs") or {}).get("buildargs") or {}
            )
        else:
            try:
                parse(bases[0])
            except UsageError as error:
                raise BackendError(f"Docker: base_image: {error}") from None
        return cls(storage, bases, digest.hexdigest())

    @classmethod
    def of(cls, storage: Mapping[str, Json], artifact: Artifact) -> Context:
        """The build of a flow. :raises BackendError: a file is not there."""
        context = cls.outside_of_flow(storage)
        context.kind, context.flow_name = artifact.kind, artifact.flow_name
        context.made_with = artifact.made_with
        context.flow_path = storage.get("path") or f"{FLOWS}/{_file_name(artifact)}"
        if artifact.kind == "pickle":
            context.flow = artifact.data
        elif storage.get("path") is None:
            if artifact.path is None:
                raise BackendError(
                    f"Docker: which script flow {artifact.flow_name!r} is in is not known; give path="
                )
            context.flow = artifact.path.read_bytes()
        if context.flow is not None:
            context.flow_sha256 = hashlib.sha256(context.flow).hexdigest()
        return context

    def dockerfile(self) -> str:
        """The text that the image is built by."""
        storage = self.storage
        if storage.get("dockerfile"):
            lines = [Path(storage["dockerfile"]).read_text("utf-8").rstrip()]
        else:
            lines = [f"FROM {self.bases[0]}"]
        for name, value in (storage.get("env_vars") or {}).items():
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            lines.append(f'ENV {name}="{escaped}"')
        if storage.get("python_dependencies"):
            pip = ["python3", "-m", "pip", "install", "--no-cache-dir", *storage["python_dependencies"]]
            lines.append(f"RUN {json.dumps(pip)}")
        lines.append(f"COPY {json.dumps([PREFIX + 'ground', ground.IN_IMAGES])}")
        for number, target in enumerate((storage.get("files") or {}).values()):
            lines.append(f"COPY {json.dumps([f'{PREFIX}file-{number}', target])}")
        if self.flow is not None:
            lines.append(f"COPY {json.dumps([PREFIX + 'flow', self.flow_path])}")
        lines += storage.get("extra_dockerfile_commands") or ()
        if not storage.get("ignore_healthchecks"):
            check = [
                "python3",
                f"{ground.IN_IMAGES}/{ground.ENTRY}",
                "--check",
                self._source(),
                self.flow_name,
            ]
            lines.append(f"RUN {json.dumps(check)}")
        return "\n".join(lines) + "\n"

    def write(self, target: IO[bytes]) -> None:
        """Write the context as a tar."""
        storage = self.storage
        with tarfile.open(fileobj=target, mode="w") as tar:
            if storage.get("dockerfile"):  # its context is the directory that it is in
                tar.add(Path(storage["dockerfile"]).parent, ".", filter=_nobodys)
            if storage.get("dockerignore"):
                _add(tar, ".dockerignore", Path(storage["dockerignore"]).read_bytes())
            _add(tar, self.dockerfile_name, self.dockerfile().encode())
            if self.flow is not None:
                _add(tar, PREFIX + "flow", self.flow)
            for name, data in ground.contents().items():
                _add(tar, f"{PREFIX}ground/{name}", data)
            for number, source in enumerate(storage.get("files") or {}):
                tar.add(source, f"{PREFIX}file-{number}", filter=_nobodys)

    def _source(self) -> str:
        path = Path(self.flow_path)
        source = {"kind": self.kind, "directory": str(path.parent), "path": path.name}
        return json.dumps({**source, "sha256": self.flow_sha256, "made_with": dict(self.made_with)})


def _file_name(artifact: Artifact) -> str:
    return f"{slug(artifact.flow_name).replace('-', '_')}{'.py' if artifact.kind == 'script' else '.pickle'}"


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_file():
        return [path]
    raise BackendError(f"Docker: {path} {'does not exist' if not path.exists() else LINK_OR_NOTHING}")


def _bases(dockerfile: Path, arguments: Mapping[str, Json]) -> list[str]:
    """The images that a Dockerfile builds on, for the credentials to pull them with."""
    found: list[str] = []
    known: dict[str, str] = {}
    stages: set[str] = set()
    begun = False
    for line in _CONTINUED.sub(" ", dockerfile.read_text("utf-8")).splitlines():
        instruction, *words = [word for word in line.split() if not word.startswith("--")] or [""]
        if instruction.upper() == "ARG":
            for word in words:
                name, _, default = word.partition("=")
                known[name] = str(arguments.get(name, default.strip("\"'")))
        elif instruction.upper() == "FROM" and words:
            image = _VARIABLE.sub(lambda match: _value(match, known), words[0].strip("\"'"))
            if image.lower() not in {*stages, "scratch"}:
                found.append(image)
            stages |= {name.lower() for name in words[2:3]}  # FROM image AS name
            begun = True
    if not begun:
        raise BackendError(f"Docker: {dockerfile} has no FROM; give it one, or use base_image=")
    return found


def _value(match: re.Match[str], known: Mapping[str, str]) -> str:
    """What stands for a variable: ``$A``, ``${A}``, ``${A:-instead}`` or ``${A:+if set}``."""
    value = known.get(match["braced"] or match["plain"], "")
    if match["sign"] == "+":
        return match["other"] if value else ""
    return value or match["other"] or ""


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Readable by whichever user the image runs as."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode |= 0o555 if entry.isdir() or entry.mode & 0o100 else 0o444
    return entry


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o644
    tar.addfile(entry, io.BytesIO(data))
