"""Registration: a flow's artifact goes to its storage, and what describes the flow goes to the store."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from flowagent import labels as label_names
from flowagent import settings as settings_of
from flowagent.backend import Artifact, Backend, BackendContext, Backends
from flowagent.errors import BackendError, NotFoundError
from flowagent.models import FlowSpec, FlowVersion, Json, Registration
from flowagent.run_configs import UniversalRun
from flowagent.settings import Settings
from flowagent.storage import Local, Storage
from flowagent.store import open_store
from flowagent.store.protocol import Store

if TYPE_CHECKING:
    from flowagent.flows.base import BaseFlow


@dataclass(frozen=True)
class Candidate:
    """A flow to register, and its file. ``default_storage`` is for one that names no storage."""

    flow: BaseFlow
    script: Path | None = None
    default_storage: Storage | None = None


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
        if storage.stored_as_script:
            artifact = Artifact(spec.name, "script", path=candidate.script)
            spec = replace(spec, storage=await backend.upload(declared, artifact))
            return await self._store.register(spec, _content_hash(spec, declared, None))
        return await self._register_pickle(spec, flow, backend, candidate.script)

    async def _register_pickle(
        self, spec: FlowSpec, flow: BaseFlow, backend: Backend, script: Path | None
    ) -> Registration:
        from flowagent.flows import pickles

        pickle = pickles.dump(flow, script.parent if script else None)
        known = {version.content_hash: version for version in await self._versions(spec.name)}
        for content_hash in _generations(_content_hash(spec, spec.storage, pickle.fingerprint)):
            version = known.get(content_hash)
            if version is None:
                break
            if await _intact(backend, version.spec.storage):
                return await self._store.register(version.spec, content_hash)
        artifact = Artifact(
            spec.name, "pickle", data=pickle.data, sha256=pickle.sha256, made_with=pickle.made_with
        )
        stored = await backend.upload(spec.storage, artifact)
        stored["artifact"] = {**stored["artifact"], "fingerprint": pickle.fingerprint}
        return await self._store.register(replace(spec, storage=stored), content_hash)

    async def _versions(self, name: str) -> list[FlowVersion]:
        try:
            return await self._store.versions(name)
        except NotFoundError:
            return []


@asynccontextmanager
async def registrar(settings: Settings | None = None) -> AsyncIterator[Registrar]:
    """A registrar on the store of the settings, open as long as the context is."""
    settings = settings or settings_of.load()
    store = await open_store(settings.store)
    try:
        yield Registrar(store, Backends(BackendContext(settings.home, settings_of.hostname())))
    finally:
        with anyio.CancelScope(shield=True):
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
    run_config = spec.run_config or UniversalRun().to_json()
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


def _content_hash(spec: FlowSpec, declared: dict[str, Json], fingerprint: str | None) -> str:
    """The key of a version: what was declared and the code, without what differs with each upload."""
    storage = spec.storage
    if artifact := storage.get("artifact"):
        storage = {**storage, "path": declared.get("path"), "artifact": artifact["sha256"]}
    content = {**replace(spec, storage=storage).to_json(), "fingerprint": fingerprint}
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
    return {key: value for key, value in storage.items() if not (uploaded and key in ("artifact", "path"))}


def _code(storage: dict[str, Json]) -> str | None:
    artifact = storage.get("artifact") or {}
    code: str | None = artifact.get("fingerprint") or artifact.get("sha256")
    return code
