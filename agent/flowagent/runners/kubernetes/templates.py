"""Job templates: read, checked, and laid over one another.

A template is a part of a Job as ``kubectl`` takes it. Tables are merged; so are lists of things with names
(containers, volumes), by name; variables are replaced by name, and everything else, pull secrets too, as a
whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowagent import http
from flowagent.errors import BackendError, FlowagentError, SettingsError, one_line

MOST = 1 << 20
"""Bytes of a template: more than any object in a cluster may have."""
DEEPEST = 40
KEYS = {"volumeMounts": "mountPath", "ports": "containerPort", "tolerations": "key", "hostAliases": "ip"}
"""By which key entries of lists are the same, where that is not their name."""
REPLACED = frozenset({"env"})
"""Lists whose entries are not merged: a variable has one source, and a part of it could be of another's."""
WHOLE = frozenset({"imagePullSecrets"})
"""Lists that are not merged: a login is not used beside another that was named in its place."""


class TemplateError(FlowagentError):
    """A job template cannot be used; ``retryable`` says whether it may be later."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


def parse(text: str | bytes, where: str) -> dict[str, Any]:
    """A template in YAML or JSON. ``where`` begins the error, which repeats nothing of the text.

    :raises TemplateError: it is none."""
    import yaml

    if len(text) > MOST:
        raise TemplateError(f"{where}: a job template has at most {MOST} bytes")
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f", line {line + 1}" if isinstance(line, int) else ""
        raise TemplateError(f"{where}{place}: this is not YAML; correct it") from None
    return checked(found, where)


def checked(template: Any, where: str) -> dict[str, Any]:
    """:raises TemplateError: what was given is no template of a Job."""
    if not isinstance(template, dict):
        raise TemplateError(f"{where}: a job template is a table with kind: Job and its spec")
    kind = template.get("kind", "Job"), template.get("apiVersion", "batch/v1")
    if kind != ("Job", "batch/v1"):
        raise TemplateError(f"{where}: it is a {kind[0]} of {kind[1]}; give a Job of batch/v1")
    _check_shape(template, where)
    return template


def read(path: Path) -> dict[str, Any]:
    """The agent's own template. :raises SettingsError: it cannot be read, or is none."""
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise SettingsError(f"job template {path} cannot be read: {error.strerror}") from error
    except TemplateError as error:
        raise SettingsError(f"job template {error}") from error


async def fetch(url: str) -> dict[str, Any]:
    """A template from the web. :raises TemplateError: it cannot be had, or is none."""
    if not url.startswith(("http://", "https://")):
        raise TemplateError(
            f"job template {http.shown(url)}: only http and https can be read from here; "
            "give it as job_template="
        )
    async with http.client() as client:
        request = http.Request(what="job template", method="GET", url=url, limit=MOST)
        try:
            response = await http.send(client, request)
        except BackendError as error:  # not of the flow's storage, as whoever reads it would think
            raise TemplateError(str(error), retryable=error.retryable) from None
    if (status := response.status_code) != 200:
        raise TemplateError(
            f"job template {http.shown(url)}: the server answers {status}; correct job_template_path",
            retryable=status in http.TRANSIENT,
        )
    return parse(response.content, f"job template {http.shown(url)}")


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``; both stay as they are."""
    found = dict(below)
    for key, value in above.items():
        known = found.get(key)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            found[key] = merged(known, value)
        elif isinstance(known, list) and isinstance(value, list) and key not in WHOLE:
            found[key] = _merged_lists(known, value, KEYS.get(key, "name"), replace=key in REPLACED)
        else:
            found[key] = value
    return found


def _merged_lists(below: list[Any], above: list[Any], by: str, *, replace: bool) -> list[Any]:
    entries = [*below, *above]
    if not all(isinstance(entry, Mapping) and isinstance(entry.get(by), (str, int)) for entry in entries):
        return above
    found = {entry[by]: entry for entry in below}
    for entry in above:
        found[entry[by]] = entry if replace else merged(found.get(entry[by], {}), entry)
    return list(found.values())


def pod_spec(template: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a template that is about its pod."""
    found: dict[str, Any] = ((template.get("spec") or {}).get("template") or {}).get("spec") or {}
    return found


def containers(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All that run in a pod, at whatever time."""
    kinds = ("initContainers", "containers", "ephemeralContainers")
    return [container for kind in kinds for container in pod.get(kind) or ()]


TABLES = frozenset(
    {"metadata", "spec", "template", "securityContext", "capabilities", "labels", "annotations", "resources"}
)
ENTRIES = {
    "containers": ("name",),
    "initContainers": ("name",),
    "ephemeralContainers": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("name", "mountPath"),
    "env": ("name",),
    "ports": (),
    "tolerations": (),
}
"""Lists of tables, and what each of these has to have: entries without it would replace what is below."""
THERE = frozenset({"metadata", "spec", "template", "containers"})
"""What null does not take away."""
MOST_PARTS = 20_000


def _check_shape(template: dict[str, Any], where: str) -> None:
    """Only as far as this program has to walk in it; the cluster checks the rest."""
    pending: list[tuple[Any, int]] = [(template, 0)]
    parts = 0
    while pending:
        value, depth = pending.pop()
        parts += 1  # what an anchor repeats counts each time
        if depth > DEEPEST or parts > MOST_PARTS:
            raise TemplateError(f"{where}: it is nested too deeply, or too long")
        if isinstance(value, list):
            pending += [(each, depth + 1) for each in value]
        elif isinstance(value, dict):
            for key, inner in value.items():
                _check_field(key, inner, where)
                pending.append((inner, depth + 1))


def _check_field(key: Any, value: Any, where: str) -> None:
    if not isinstance(key, str):
        raise TemplateError(f"{where}: {one_line(repr(key), 40)} is no name of a field")
    if value is None and key not in THERE:
        return
    if key in TABLES and not isinstance(value, dict):
        raise TemplateError(f"{where}: {key} takes a table")
    if key not in ENTRIES:
        return
    if not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
        raise TemplateError(f"{where}: {key} takes a list of tables")
    for field in ENTRIES[key]:
        if not all(isinstance(each.get(field), str) and each[field] for each in value):
            raise TemplateError(f"{where}: {key} takes tables that all have a {field}")
