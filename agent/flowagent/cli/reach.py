"""What ``doctor`` finds out about what an agent has to reach: repositories, engines, clusters, clocks."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from flowagent.cli.doctor import Finding
from flowagent.errors import FlowagentError

if TYPE_CHECKING:
    from flowagent.kubernetes import Cluster
    from flowagent.settings import Settings
    from flowagent.store.protocol import Store

PATIENCE = 60.0
"""Seconds for a repository, and a few for all else."""
SHORT = 10.0
MOST_SKEW = 2.0
"""Seconds by which clocks may differ before it shows in when runs are due."""
SECRET = "DOCTOR_REPOSITORY"  # noqa: S105 - the name of one


async def git(settings: Settings) -> Finding:
    program = shutil.which("git")
    if program is None:
        return Finding(
            "git", "note", "not installed: flows in Git repositories need it", "apt-get install git"
        )
    said = await _output([program, "--version"])
    return Finding(
        "git", "ok", f"{said.removeprefix('git version ') or 'of an unknown version'} at {program}"
    )


async def ssh(settings: Settings) -> Finding:
    """The keys and known hosts with which repositories by ssh are fetched."""
    return await anyio.to_thread.run_sync(_ssh, settings)


def _ssh(settings: Settings) -> Finding:
    rules = settings.openings.hosts.values()
    directory = settings.openings.directory or Path("~/.ssh").expanduser()
    if settings.openings.client == "openssh" and shutil.which("ssh") is None:
        remedy = "apt-get install openssh-client"
        return Finding("ssh", "failed", "ssh_client is openssh, and there is none", remedy)
    keys = [Path(str(rule["key"])).expanduser() for rule in rules if "key" in rule]
    keys += sorted(path for path in directory.glob("id_*") if path.suffix != ".pub")
    for key in keys:
        if (bad := _bad_key(key)) is not None:
            return bad
    count = len(keys) + sum("key_secret" in rule for rule in rules)
    agent = "those of an agent" if os.environ.get("SSH_AUTH_SOCK") else ""
    if not count and not agent:
        return Finding(
            "ssh",
            "note",
            f"no keys in {directory}: only private repositories by ssh need one",
            "ssh-keygen -t ed25519, or key and key_secret of [ssh]",
        )
    have = "keys: " + " and ".join(filter(None, [str(count) if count else "", agent]))
    known = _lines(directory / "known_hosts") + _lines(Path("/etc/ssh/ssh_known_hosts"))
    known += sum(len(rule.get("known_hosts", ())) for rule in rules)
    if not known:
        where = f"add it to {directory}/known_hosts"
        remedy = f"compare what ssh-keyscan HOST says with what the host publishes, and {where}"
        return Finding("ssh", "note", f"{have}; no host is known, and unknown ones are refused", remedy)
    return Finding("ssh", "ok", f"{have}; known hosts: {known} lines")


def _bad_key(key: Path) -> Finding | None:
    try:
        mode = key.stat().st_mode
        key.open("rb").close()
    except OSError as error:
        why = f"the key {key} cannot be read: {error.strerror}"
        return Finding("ssh", "failed", why, "correct [ssh], or its owner")
    if stat.S_IMODE(mode) & 0o077:
        return Finding("ssh", "note", f"others may read the key {key}", f"close it: chmod 600 {key}")
    return None


async def repository(settings: Settings, url: str) -> Finding:
    """Whether a repository can be read, in the way in which an agent reads it."""
    from flowagent.backend import BackendContext, Backends
    from flowagent.cli.config import mask_text
    from flowagent.secrets import PREFIX
    from flowagent.storage import Git

    shown = mask_text(url)
    context = BackendContext.of(settings, environ={**os.environ, PREFIX + SECRET: url})
    backends = Backends(context)
    try:
        with anyio.fail_after(PATIENCE):
            storage = Git("flow.py", git_clone_url_secret_name=SECRET).to_json()
            revision = await backends.get("Git").resolve(storage)
    except TimeoutError:
        return Finding(
            "repository", "failed", f"{shown}: no answer within {PATIENCE:g} s", "check the network"
        )
    except FlowagentError as error:
        why = str(error).replace(url, shown).replace(f"secret {SECRET}", "--repo")
        return Finding("repository", "failed", why)
    finally:
        with anyio.CancelScope(shield=True):
            await backends.close()
    return Finding("repository", "ok", f"{shown} can be read, its HEAD is {revision.id}")


async def docker(settings: Settings) -> Finding:
    from flowagent.docker.client import Engine

    needed = settings.runner == "docker"
    try:
        engine = Engine(settings.engine)
        try:
            version = await engine.call("GET", "/version", timeout=SHORT)
        finally:
            await engine.close()
    except FlowagentError as error:
        why = str(error) if needed else f"{error}: only --runner docker needs one"
        remedy = (
            "start it: systemctl start docker"
            if needed
            else "for that: apt-get install docker.io, or set engine"
        )
        return Finding("docker", "failed" if needed else "note", why, remedy)
    return Finding("docker", "ok", f"engine {version.get('Version')} at {engine.url}")


async def kubernetes(settings: Settings, environ: Mapping[str, str] = os.environ) -> Finding:
    """Whether the cluster answers, and whether all is allowed there that an agent does."""
    from flowagent.kubernetes import client

    needed = settings.runner == "kubernetes"
    bad = "failed" if needed else "note"
    if not (environ.get("KUBERNETES_SERVICE_HOST") or client.kubeconfigs(environ)):
        unless = "" if needed else ": only runs in pods need it"
        if named := environ.get("KUBECONFIG"):
            why = f"KUBECONFIG names {named}, and there is no such file{unless}"
            return Finding("kubernetes", bad, why, "correct KUBECONFIG, or unset it")
        why = f"neither in a cluster nor with a kubeconfig{unless}"
        return Finding(
            "kubernetes",
            bad,
            why,
            "set KUBECONFIG, or start the agent in a pod: flowagent kubernetes manifest",
        )
    try:
        cluster = client.Cluster(settings.namespace, settings.context, environ)
        try:
            with anyio.fail_after(SHORT):
                version = await cluster.call("GET", "/version")
                missing = await _missing_rights(cluster)
        finally:
            await cluster.close()
    except TimeoutError:
        return Finding("kubernetes", bad, f"no answer within {SHORT:g} s", "check the network")
    except FlowagentError as error:
        return Finding(
            "kubernetes", bad, str(error), "compare with: kubectl cluster-info; kubectl auth whoami"
        )
    where = f"{version.get('gitVersion')} at {cluster.url}, namespace {cluster.namespace}"
    if missing:
        why = f"{where}: an agent may not {', '.join(missing)}"
        return Finding("kubernetes", bad, why, "flowagent kubernetes manifest | kubectl apply -f -")
    return Finding("kubernetes", "ok", where)


async def _missing_rights(cluster: Cluster) -> list[str]:
    """Of what an agent does in its namespace, what is not allowed there, such as ``"create jobs"``."""
    from flowagent.kubernetes.manifest import RIGHTS

    missing = []
    for right in RIGHTS:
        resource, _, part = right.resource.partition("/")
        asked = {"namespace": cluster.namespace, "group": right.group, "resource": resource}
        for verb in right.verbs:
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": {**asked, "subresource": part, "verb": verb}},
            }
            answer = await cluster.call(
                "POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=review
            )
            if not (answer.get("status") or {}).get("allowed"):
                missing.append(f"{verb} {right.resource}")
    return missing


async def clock(store: Store, now: Callable[[], float] = time.time) -> Finding:
    """How far the clock here is from the store's, by which runs are due."""
    before = now()
    there = await store.clock()
    after = now()
    skew = (before + after) / 2 - there
    if abs(skew) > MOST_SKEW + (after - before) / 2:
        which = "ahead of" if skew > 0 else "behind"
        return Finding(
            "clock", "note", f"{abs(skew):.1f} s {which} the store's", "have it set: timedatectl set-ntp true"
        )
    return Finding(
        "clock", "ok", f"within {max(abs(skew), (after - before) / 2, 0.001):.3f} s of the store's"
    )


def _lines(path: Path) -> int:
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:
        return 0
    return len(re.findall(r"^\s*[^#\s]", text, re.MULTILINE))


async def _output(command: list[str]) -> str:
    """What a program says, in one line."""
    try:
        with anyio.fail_after(SHORT + 5):
            done = await anyio.run_process(command, check=False, stdin=subprocess.DEVNULL)
    except TimeoutError:
        return f"no answer within {SHORT + 5:g} s"
    except OSError as error:
        return str(error.strerror)
    return " ".join((done.stdout or done.stderr).decode(errors="replace").split())
