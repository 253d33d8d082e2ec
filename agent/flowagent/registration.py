"""Registration: a flow's artifact goes to its storage, and what describes the flow goes to the store."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from flowagent import labels as label_names
from flowagent import settings as settings_of
from flowagent.backend import (
    Artifact,
    Backend,
    BackendContext,
    Backends,
    Features,
    Progress,
    unsaid,
    unseen,
)
from flowagent.errors import BackendError, NotFoundError, UsageError
from flowagent.models import FlowSpec, FlowVersion, Json, Registration
from flowagent.run_configs import RunConfig, UniversalRun
from flowagent.settings import Settings
from flowagent.storage import Local, Storage
from flowagent.store import open_store
from flowagent.store.protocol import Store

if TYPE_CHECKING:
    from flowagent.flows.base import BaseFlow


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Candidate:
    """A flow to register, and its file. ``default_storage`` is for one that names no storage."""

    flow: BaseFlow
    script: Path | None = None
    default_storage: Storage | None = None


@dataclass(frozen=True)
class _Made:
    """An artifact. ``fingerprint``: equal for equal content; None: nothing is brought to the storage."""

    artifact: Artifact
    fingerprint: str | None


class Registrar:
    """Registers flows in one store; the backends are those of this machine."""

    def __init__(self, store: Store, backends: Backends) -> None:
        self._store = store
        self._backends = backends

    async def register(
        self, candidate: Candidate, *, project: str | None = None, labels: Iterable[str] = ()
    ) -> Registration:
        """Make this flow the current version of its name; the same content is the same version.

        :raises FlowagentError: it cannot be pickled, uploaded or stored."""
        flow = candidate.flow
        storage = flow.storage or candidate.default_storage or Local()
        declared = storage.to_json()
        backend = self._backends.get(declared["type"])
        spec = _spec(flow, backend, declared, project, labels)
        with _workplace(f"{backend.type}: flow {flow.name!r}") as directory:
            made = await anyio.to_thread.run_sync(_artifact, flow, storage, candidate, directory)
            _check_kind(backend, made.artifact)
            if made.fingerprint is not None:
                return await self._keep(spec, backend, made)
            spec = replace(spec, storage=await backend.upload(declared, made.artifact))
        return await self._store.register(spec, _content_hash(spec, None))

    async def _keep(self, spec: FlowSpec, backend: Backend, made: _Made) -> Registration:
        """Upload an artifact, unless a version has it that can still be had."""
        known = {version.content_hash: version for version in await self._versions(spec.name)}
        for content_hash in _generations(_content_hash(spec, made.fingerprint)):
            version = known.get(content_hash)
            if version is None:
                break
            if await _intact(backend, version.spec.storage):
                return await self._store.register(version.spec, content_hash)
        stored = await backend.upload(spec.storage, made.artifact)
        stored["artifact"] = {**stored["artifact"], "fingerprint": made.fingerprint}
        return await self._store.register(replace(spec, storage=stored), content_hash)

    async def _versions(self, name: str) -> list[FlowVersion]:
        try:
            return await self._store.versions(name)
        except NotFoundError:
            return []


@asynccontextmanager
async def registrar(
    settings: Settings | None = None,
    progress: Progress = unseen,
    say: Callable[[str], None] = unsaid,
) -> AsyncIterator[Registrar]:
    """A registrar on the store of the settings, open as long as the context is."""
    settings = settings or settings_of.load()
    store = await open_store(settings.store)
    backends = Backends(BackendContext.of(settings, progress=progress, say=say))
    try:
        yield Registrar(store, backends)
    finally:
        with anyio.CancelScope(shield=True):
            await backends.close()
            await store.close()


async def register(
    flow: BaseFlow,
    *,
    project: str | None = None,
    labels: Iterable[str] = (),
    script: Path | None = None,
    settings: Settings | None = None,
) -> Registration:
    """Register one flow; ``script`` is the file that defines it. Raises as :meth:`Registrar.register`."""
    async with registrar(settings) as open_registrar:
        return await open_registrar.register(Candidate(flow, script), project=project, labels=labels)


async def register_all(
    candidates: Iterable[Candidate],
    *,
    project: str | None = None,
    labels: Iterable[str] = (),
    settings: Settings | None = None,
) -> list[Registration]:
    """Register several flows, in order. The first that fails ends it; those before stay registered."""
    labels = tuple(labels)
    async with registrar(settings) as open_registrar:
        return [
            await open_registrar.register(candidate, project=project, labels=labels)
            for candidate in candidates
        ]


def register_flow(
    flow: BaseFlow,
    *,
    project: str | None = None,
    labels: Iterable[str] = (),
    script: Path | None = None,
    settings: Settings | None = None,
) -> Registration:
    """As :func:`register`, for code that is not async; within a running loop (a notebook), from a thread."""
    job = partial(register, flow, project=project, labels=labels, script=script, settings=settings)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return anyio.run(job)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(anyio.run, job).result()


# -- what is stored ------------------------------------------------------------------------------------


def _spec(
    flow: BaseFlow, backend: Backend, storage: dict[str, Json], project: str | None, labels: Iterable[str]
) -> FlowSpec:
    """The flow's description with all defaults that follow from its storage."""
    spec = FlowSpec.from_json(flow.describe())
    run_config = _with_template(spec.run_config or UniversalRun().to_json())
    label_names.common_runners(RunConfig.from_json(run_config).runners, storage.get("runners") or ())
    all_labels = (
        *spec.labels,
        *run_config["labels"],
        *storage["labels"],
        *backend.default_labels(storage),
        *labels,
    )
    return replace(
        spec,
        storage=storage,
        run_config=run_config,
        labels=label_names.parse(all_labels),
        result=spec.result or backend.default_result(storage),
        project=project or spec.project,
    )


def _with_template(run_config: dict[str, Json]) -> dict[str, Json]:
    """A job template in a file goes into the registry: the agent is on another machine.

    :raises UsageError: it cannot be read, or an agent could not."""
    path = run_config.get("job_template_path")
    if path is None or path.startswith(("http://", "https://")):
        return run_config
    if "://" in path:
        raise UsageError(
            f"job_template_path {path} is neither a file nor an http or https URL, which are all that can be "
            "read; give what is in it as job_template="
        )
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"job_template_path {path} cannot be read: {why}; correct the path") from None
    return {**run_config, "job_template": text, "job_template_path": None}


@contextmanager
def _workplace(what: str) -> Iterator[Path]:
    """A directory for what is made of a flow; it goes at the end. ``what`` begins errors.

    :raises UsageError: there is no room in it, or where a backend looks at what the storage has."""
    try:
        with tempfile.TemporaryDirectory(prefix="flowagent-") as directory:
            yield Path(directory)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        temporary = tempfile.gettempdir()
        place = str(error.filename or temporary)
        mend = "free space there"
        if Path(place).is_relative_to(temporary):
            place, mend = temporary, f"{mend}, or set TMPDIR to another directory"
        raise UsageError(
            f"{what} is not registered, as {place} has no room for it: {error.strerror}; {mend}"
        ) from error


def _artifact(flow: BaseFlow, storage: Storage, candidate: Candidate, directory: Path) -> _Made:
    """What is to be stored of a flow: a pickle, its script, or with side files a bundle in ``directory``."""
    given = {name: value for name in storage.unstored if (value := getattr(storage, name)) is not None}
    named = given.get("local_script_path") or getattr(storage, "flow_script_path", None)
    named = named or (storage.path if isinstance(storage, Local) else None)
    script = Path(named) if named else candidate.script
    if not storage.stored_as_script:
        from flowagent.flows import pickles

        pickle = pickles.dump(flow, candidate.script.parent if candidate.script else None)
        return _Made(
            Artifact(
                flow.name,
                "pickle",
                data=pickle.data,
                sha256=pickle.sha256,
                made_with=pickle.made_with,
                given=given,
            ),
            pickle.fingerprint,
        )
    include = getattr(storage, "include", ())
    if include:
        return _bundle(flow, _readable(flow, script), include, directory, given)
    if storage.keeps_scripts and script is not None:
        sha256 = hashlib.sha256(_readable(flow, script).read_bytes()).hexdigest()
        artifact = Artifact(flow.name, "script", path=script, sha256=sha256, entry=script.name, given=given)
        return _Made(artifact, f"script:{script.name}:{sha256}")
    return _Made(Artifact(flow.name, "script", path=candidate.script, given=given), None)


def _bundle(
    flow: BaseFlow, script: Path, include: Iterable[str], directory: Path, given: dict[str, Json]
) -> _Made:
    from flowagent import bundles

    bundle = bundles.pack(script, include, directory / "bundle")
    artifact = Artifact(
        flow.name, "bundle", path=bundle.path, sha256=bundle.sha256, entry=bundle.entry, given=given
    )
    return _Made(artifact, f"bundle:{bundle.entry}:{bundle.sha256}")


def _readable(flow: BaseFlow, script: Path | None) -> Path:
    if script is None:
        raise UsageError(
            f"which script flow {flow.name!r} is stored as is not known; register it with: flowagent register"
        )
    if not (script.is_file() and os.access(script, os.R_OK)):
        raise UsageError(f"flow {flow.name!r}: there is no script {script} to read; correct its path")
    return script


def _check_kind(backend: Backend, artifact: Artifact) -> None:
    features: Features | None = getattr(backend, "features", None)
    if features is not None and artifact.kind not in features.kinds:
        instead = {
            "pickle": "add stored_as_script=True",
            "bundle": "leave out include=",
            "script": "leave out stored_as_script=True",
        }
        raise BackendError(
            f"{backend.type}: keeps {' and '.join(f'{kind}s' for kind in features.kinds)}, and no "
            f"{artifact.kind}s, so flow {artifact.flow_name!r} is not stored; {instead[artifact.kind]}"
        )


def _content_hash(spec: FlowSpec, fingerprint: str | None) -> str:
    """The key of a version: what was declared and the code, without what differs with each upload."""
    content = {**spec.to_json(), "fingerprint": fingerprint}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _generations(content_hash: str) -> Iterator[str]:
    """The key of a version, then those of versions that replace it when its artifact was lost."""
    yield content_hash
    generation = 1
    while True:
        yield hashlib.sha256(f"{content_hash}:{generation}".encode()).hexdigest()
        generation += 1


async def _intact(backend: Backend, storage: dict[str, Json]) -> bool:
    """Whether the artifact of a version can still be had, as it was registered."""
    try:
        revision = await backend.resolve(storage)
        with tempfile.TemporaryDirectory(prefix="flowagent-") as directory:
            await backend.materialise(storage, revision, Path(directory))
            if storage["artifact"]["kind"] == "script":  # which may have been edited there
                assert revision.entry.path is not None
                content = (Path(directory) / revision.entry.path).read_bytes()
                return bool(hashlib.sha256(content).hexdigest() == storage["artifact"]["sha256"])
    except BackendError as error:
        if error.retryable:
            raise
        return False
    return True


# -- what is said ----------------------------------------------------------------------------------------


def summary(registration: Registration) -> str:
    """One line for the person who registered: which version, its labels, and what is different in it."""
    version, previous = registration.version, registration.previous
    name = version.spec.name
    if previous is not None and previous.version_id == version.version_id:
        return f"{name} is unchanged: version {version.number}"
    labels = f"labels: {', '.join(version.spec.labels)}" if version.spec.labels else "no labels"
    verb = "registered" if registration.created else "went back to"
    difference = "new" if previous is None else f"changed {', '.join(changes(previous.spec, version.spec))}"
    return f"{verb} {name} version {version.number} ({labels}): {difference}"


def changes(old: FlowSpec, new: FlowSpec) -> list[str]:
    """In which respects two versions of a flow differ; never empty, as they are two."""
    respects: dict[str, tuple[Any, Any]] = {
        "kind": (old.kind, new.kind),
        "project": (old.project, new.project),
        "storage": (_place(old.storage), _place(new.storage)),
        "labels": (sorted(old.labels), sorted(new.labels)),
        "parameters": (old.parameters, new.parameters),
        "tasks": (old.tasks, new.tasks),
        "run config": (old.run_config, new.run_config),
        "secrets": (sorted(old.secrets), sorted(new.secrets)),
        "result": (old.result, new.result),
        "code": (_code(old.storage), _code(new.storage)),
    }
    return [respect for respect, (before, after) in respects.items() if before != after] or ["storage"]


def _place(storage: dict[str, Json]) -> dict[str, Json]:
    uploaded = storage.get("artifact") is not None
    made = ("artifact", "path", "key", "blob_name")  # where registration put it
    return {key: value for key, value in storage.items() if not (uploaded and key in made)}


def _code(storage: dict[str, Json]) -> str | None:
    artifact = storage.get("artifact") or {}
    code: str | None = artifact.get("fingerprint") or artifact.get("sha256")
    return code
