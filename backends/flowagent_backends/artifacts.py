"""Artifacts that a registration pins by their digest: pickles and bundles, wherever they are stored."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowagent import bundles
from flowagent.backend import Artifact, Entry, Revision
from flowagent.errors import BackendError
from flowagent.models import Json

PICKLE = "flow.pickle"
"""The file of a pickled flow within its source."""
KINDS = ("pickle", "script", "bundle")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def describe(artifact: Artifact, size: int) -> dict[str, Json]:
    """What a reference says of an artifact of ``size`` bytes, under ``artifact``."""
    assert artifact.sha256 is not None
    described: dict[str, Json] = {
        "kind": artifact.kind,
        "sha256": artifact.sha256,
        "size": size,
        "made_with": dict(artifact.made_with),
    }
    return {**described, "entry": artifact.entry} if artifact.entry else described


def registered(storage: Mapping[str, Json]) -> Mapping[str, Any] | None:
    """What a reference says of its artifact; None: nothing.

    :raises BackendError: no registration has written this, or it names a file elsewhere"""
    artifact: Mapping[str, Any] | None = storage.get("artifact")
    if artifact is None:
        return None
    known = isinstance(artifact, Mapping) and artifact.get("kind") in KINDS
    if (
        not known
        or not _SHA256.fullmatch(str(artifact.get("sha256")))
        or type(artifact.get("size")) is not int
        or not isinstance(artifact.get("made_with", {}), Mapping)
        or not (is_name(artifact.get("entry")) or (artifact["kind"] != "bundle" and "entry" not in artifact))
    ):
        raise BackendError(
            f"{storage['type']}: what the store has of the flow's artifact is wrong; register it again"
        )
    return artifact


def is_name(value: Any) -> bool:
    """Whether this can be the name of a file, in a directory and nowhere else."""
    if not isinstance(value, str) or value in ("", ".", "..") or "/" in value or "\0" in value:
        return False
    return len(value.encode(errors="surrogatepass")) <= 255


def pinned(storage: Mapping[str, Json], place: str = "") -> Revision | None:
    """The revision of a pickle or bundle, for which nobody has to be asked; None: it is neither.

    ``place``: where it is, as far as that says who may read it."""
    artifact = registered(storage)
    if artifact is None or artifact["kind"] == "script":
        return None
    revision = f"sha256:{artifact['sha256']}"
    if artifact["kind"] == "pickle":
        made_with = artifact.get("made_with", {})
        entry = Entry("pickle", PICKLE, sha256=artifact["sha256"], made_with=made_with)
    else:
        entry = Entry("script", artifact["entry"])
    return Revision(revision, entry, key=f"{place} {revision}" if place else "")


def too_large(what: str) -> BackendError:
    return BackendError(f"{what} is larger than this agent takes; see max_source in its configuration")


def settle(what: str, storage: Mapping[str, Json], fetched: Path, sha256: str, directory: Path) -> None:
    """Make the file that was fetched into ``directory`` the source: a pickle is named, a bundle unpacked.

    Blocks; run it in a thread. ``what`` begins errors.

    :raises BackendError: it is not what was registered; the file is gone then, and nothing was executed."""
    artifact: Mapping[str, Any] = storage["artifact"]
    if sha256 != artifact["sha256"]:
        fetched.unlink()
        raise BackendError(
            f"{what} has the digest sha256:{sha256}, and was registered with sha256:{artifact['sha256']}; "
            "it was changed since: register the flow again"
        )
    if artifact["kind"] == "pickle":
        fetched.rename(directory / PICKLE)
        return
    with fetched.open("rb") as archive:
        fetched.unlink()  # its name must not be in the way of what is in it
        bundles.unpack(archive, directory, what)


def digest(file: Path) -> tuple[int, str]:
    """Size and sha-256 of a file. Blocks. :raises OSError:"""
    with file.open("rb") as source:
        sha256 = hashlib.file_digest(source, "sha256").hexdigest()
        return source.tell(), sha256
