"""Flows in container images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from flowagent.flows.declarations import absolute, flag, plain, text
from flowagent.flows.errors import FlowError
from flowagent.storage.base import Storage

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BUILD = (
    "buildargs",
    "target",
    "nocache",
    "pull",
    "network_mode",
    "platform",
    "labels",
    "shmsize",
    "extra_hosts",
)
"""What ``build_kwargs`` can name."""
_INSTEAD = {
    "prefect_version": "leave it out: what runs the flow comes with it",
    "prefect_directory": "leave it out; path= names a flow that is in the image already",
    "tls_config": "set DOCKER_TLS_VERIFY and DOCKER_CERT_PATH",
}


class Docker(Storage):
    """An image with the flow in it, built on ``base_image`` or by ``dockerfile`` when the flow is registered.

    It is pushed to ``registry_url`` as ``<slug of the flow's name>:<slug of the time>`` unless ``image_name``
    and ``image_tag`` say otherwise; without ``registry_url`` it stays on this machine's engine. ``files``
    maps files and directories here to paths in the image; ``env_vars`` are variables, in which ``$NAME`` is
    replaced; ``python_dependencies`` are installed by pip; ``extra_dockerfile_commands`` come last. With
    ``local_image`` the base image is not looked for in a registry. ``path`` is a flow that is in the image
    already. The image has to load the flow, unless ``ignore_healthchecks``. ``build_kwargs`` are options of
    the build: buildargs, target, nocache, pull, network_mode, platform, labels, shmsize, extra_hosts.

    :raises FlowError: arguments that contradict each other
    """

    fields: ClassVar[tuple[str, ...]] = (
        "registry_url",
        "image_name",
        "image_tag",
        "base_image",
        "dockerfile",
        "dockerignore",
        "python_dependencies",
        "env_vars",
        "files",
        "local_image",
        "path",
        "build_kwargs",
        "extra_dockerfile_commands",
        "ignore_healthchecks",
        "base_url",
    )
    runners: ClassVar[tuple[str, ...]] = ("docker", "kubernetes")
    keeps_scripts: ClassVar[bool] = True

    def __init__(
        self,
        registry_url: str | None = None,
        image_name: str | None = None,
        image_tag: str | None = None,
        base_image: str | None = None,
        dockerfile: str | os.PathLike[str] | None = None,
        python_dependencies: Iterable[str] | None = (),
        env_vars: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        local_image: bool = False,
        path: str | None = None,
        stored_as_script: bool = False,
        build_kwargs: Mapping[str, Any] | None = None,
        extra_dockerfile_commands: Iterable[str] | None = (),
        ignore_healthchecks: bool = False,
        *,
        dockerignore: str | os.PathLike[str] | None = None,
        base_url: str | None = None,
        **options: Any,
    ) -> None:
        for name in options:
            if name in _INSTEAD:
                raise FlowError(f"storage Docker has no argument {name!r}; {_INSTEAD[name]}")
        super().__init__(stored_as_script=stored_as_script, **options)
        if base_image is not None and dockerfile is not None:
            raise FlowError("storage Docker: base_image and dockerfile exclude each other; give only one")
        registry = text(registry_url, "storage Docker: registry_url")
        self.registry_url = registry.rstrip("/") if registry else None
        self.image_name = text(image_name, "storage Docker: image_name")
        self.image_tag = text(image_tag, "storage Docker: image_tag")
        self.base_image = text(base_image, "storage Docker: base_image")
        self.dockerfile = absolute(dockerfile, "storage Docker: dockerfile")
        self.dockerignore = absolute(dockerignore, "storage Docker: dockerignore")
        self.python_dependencies = _lines(python_dependencies, "storage Docker: python_dependencies")
        self.env_vars = _variables(env_vars)
        self.files = _files(files)
        self.local_image = flag(local_image, "storage Docker: local_image")
        self.path = text(path, "storage Docker: path")
        if path is not None and not path.startswith("/"):
            raise FlowError(f"storage Docker: path is absolute, in the image; got {path!r}")
        self.build_kwargs = _build(build_kwargs)
        self.extra_dockerfile_commands = _lines(
            extra_dockerfile_commands, "storage Docker: extra_dockerfile_commands"
        )
        self.ignore_healthchecks = flag(ignore_healthchecks, "storage Docker: ignore_healthchecks")
        self.base_url = text(base_url, "storage Docker: base_url")


def _lines(value: Iterable[str] | None, what: str) -> list[str]:
    """A list of single lines, in its order."""
    if isinstance(value, (str, bytes, Mapping)):
        raise FlowError(f"{what} takes a list of strings; got {value!r}")
    listed = list(value or ())
    for item in listed:
        if not isinstance(item, str) or not item.strip() or "\n" in item or "\0" in item:
            raise FlowError(f"{what} takes non-empty strings of one line; got {item!r}")
    return listed


def _variables(value: Mapping[str, str] | None) -> dict[str, str]:
    if value is not None and not isinstance(value, Mapping):
        raise FlowError(f"storage Docker: env_vars takes a dict of strings; got {type(value).__name__}")
    for name, content in (value or {}).items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise FlowError(f"storage Docker: env_vars has {name!r}, which is no name of a variable")
        if not isinstance(content, str) or "\n" in content or "\0" in content:
            raise FlowError(f"storage Docker: env_vars[{name!r}] must be a string of one line")
    return dict(value or {})


def _files(value: Mapping[str, str] | None) -> dict[str, str]:
    if value is not None and not isinstance(value, Mapping):
        raise FlowError(f"storage Docker: files takes a dict of paths; got {type(value).__name__}")
    checked = {}
    for source, target in (value or {}).items():
        if not isinstance(target, str) or not target.startswith("/") or "\n" in target:
            raise FlowError(
                f"storage Docker: files has to map to absolute paths in the image; got {target!r}"
            )
        checked[absolute(source, "storage Docker: files") or ""] = target
    return checked


def _build(value: Mapping[str, Any] | None) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise FlowError(f"storage Docker: build_kwargs takes a dict; got {type(value).__name__}")
    for name in value or {}:
        if name not in _BUILD:
            raise FlowError(f"storage Docker: build_kwargs has no {name!r}; known are {', '.join(_BUILD)}")
    if not isinstance((value or {}).get("buildargs", {}), Mapping):
        raise FlowError("storage Docker: buildargs of build_kwargs takes a dict of strings")
    checked: dict[str, Any] = plain(dict(value or {}), "storage Docker: build_kwargs")
    return checked
