"""Run configs: how a flow's runs are executed. Plain data; the runners are in ``flowagent.runners``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from flowagent.flows.declarations import (
    Declaration,
    absolute,
    count,
    names,
    plain,
    refuse,
    seconds,
    text,
)
from flowagent.flows.declarations import (
    limits as checked_limits,
)
from flowagent.flows.errors import FlowError

if TYPE_CHECKING:
    from datetime import timedelta

__all__ = ["DockerRun", "KubernetesRun", "LocalRun", "RunConfig", "UniversalRun"]

SANDBOXES = ("process", "landlock", "namespace")
"""What ``LocalRun(sandbox=...)`` can demand, weakest first."""


def _environment(value: Mapping[str, str] | None, what: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FlowError(f"{what}: env takes a dict of strings; got {type(value).__name__}")
    for name, content in value.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise FlowError(f"{what}: env has a name that no environment can hold: {name!r}")
        if not isinstance(content, str) or "\0" in content:
            raise FlowError(
                f"{what}: env[{name!r}] must be a string without NUL; got {type(content).__name__}"
            )
    return dict(value)


class RunConfig(Declaration):
    """Base of all run configs.

    ``timeout`` limits each attempt, in seconds. ``retries`` attempts follow one that failed or crashed,
    ``retry_delay`` seconds later. ``runners`` are the runners that can execute it; empty: any.
    """

    family: ClassVar[str] = "run config"
    common: ClassVar[tuple[str, ...]] = ("env", "labels", "timeout", "retries", "retry_delay")
    runners: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        env: Mapping[str, str] | None = None,
        labels: Iterable[str] | None = None,
        *,
        timeout: float | timedelta | None = None,
        retries: int = 0,
        retry_delay: float | timedelta = 0,
        **unknown: Any,
    ) -> None:
        what = self.type
        refuse(
            what,
            unknown,
            {"working_dir": "only LocalRun has it", "image": "only DockerRun and KubernetesRun do"},
        )
        self.env = _environment(env, what)
        self.labels = names(labels, f"{what}: labels")
        self.timeout = seconds(timeout, f"{what}: timeout")
        self.retries = count(retries, f"{what}: retries")
        self.retry_delay = seconds(retry_delay, f"{what}: retry_delay", zero=True) or 0.0


class UniversalRun(RunConfig):
    """Any runner that the agent has."""


class LocalRun(RunConfig):
    """A process on the agent's machine.

    ``python`` is the interpreter, a path or a name on the agent's PATH; ``working_dir`` is made absolute;
    ``sandbox`` is the weakest level that will do, or the run fails. ``read`` and ``write`` are the paths that
    the flow needs of those which its agent can allow (None: all of them); ``network`` is False for none, or a
    dict of TCP ports such as ``{"connect": [443], "bind": []}``. ``limits`` are those that are less than the
    agent's, such as ``{"memory": "2G", "cpu_time": 600}``. ``preload`` are modules that are imported before
    the run, once for all runs that name them.
    """

    fields: ClassVar[tuple[str, ...]] = (
        "working_dir",
        "python",
        "sandbox",
        "read",
        "write",
        "network",
        "limits",
        "preload",
    )
    runners: ClassVar[tuple[str, ...]] = ("process",)

    def __init__(
        self,
        env: Mapping[str, str] | None = None,
        working_dir: str | os.PathLike[str] | None = None,
        labels: Iterable[str] | None = None,
        *,
        python: str | os.PathLike[str] | None = None,
        sandbox: str | None = None,
        read: Iterable[str | os.PathLike[str]] | None = None,
        write: Iterable[str | os.PathLike[str]] | None = None,
        network: bool | Mapping[str, Iterable[int]] = True,
        limits: Mapping[str, Any] | None = None,
        preload: Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(env, labels, **options)
        self.working_dir = absolute(working_dir, "LocalRun: working_dir")
        interpreter = text(
            os.fspath(python) if isinstance(python, os.PathLike) else python, "LocalRun: python"
        )
        by_path = interpreter is not None and ("/" in interpreter or interpreter.startswith("~"))
        self.python = absolute(interpreter, "LocalRun: python") if by_path else interpreter
        if sandbox is not None and sandbox not in SANDBOXES:
            raise FlowError(f"LocalRun: sandbox is one of {', '.join(SANDBOXES)}; got {sandbox!r}")
        self.sandbox = sandbox
        self.read = _paths(read, "LocalRun: read")
        self.write = _paths(write, "LocalRun: write")
        self.network = _network(network)
        self.limits = checked_limits(limits, "LocalRun: limits")
        self.preload = list(names(preload, "LocalRun: preload"))
        for name in self.preload:
            if not all(part.isidentifier() for part in name.split(".")):
                raise FlowError(f"LocalRun: preload takes names of modules; got {name!r}")


def _paths(value: Iterable[str | os.PathLike[str]] | None, what: str) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes, os.PathLike)):
        raise FlowError(f"{what} takes a list of paths; got {value!r}")
    return sorted({absolute(path, what) or "" for path in value} - {""})


def _network(value: bool | Mapping[str, Iterable[int]]) -> bool | dict[str, list[int]]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, Mapping) or not value or set(value) - {"connect", "bind"}:
        raise FlowError(f"LocalRun: network is True, False, or a dict of 'connect' and 'bind'; got {value!r}")
    checked = {}
    for way, ports in value.items():
        what = f"LocalRun: network[{way!r}]"
        if isinstance(ports, (str, bytes, Mapping)):
            raise FlowError(f"{what} takes a list of TCP ports; got {ports!r}")
        checked[way] = [_port(port, what) for port in ports]
    return checked


def _port(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 65536:
        raise FlowError(f"{what} takes whole numbers from 1 to 65535; got {value!r}")
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(each, str) for each in value.values())


def _objects(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, Mapping) for each in value)


_HOST_CONFIG: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("Memory", "MemoryReservation", "ShmSize"), (_whole, "a whole number of bytes")),
    **dict.fromkeys(("NanoCpus", "CpuShares", "CpuPeriod", "CpuQuota"), (_whole, "a whole number")),
    "PidsLimit": (_whole, "a whole number"),
    "CpusetCpus": (lambda value: isinstance(value, str), "a string such as '0-3'"),
    "ReadonlyRootfs": (lambda value: isinstance(value, bool), "True or False"),
    "Tmpfs": (_by_name, "a dict of strings such as {'/scratch': 'size=64m'}"),
    **dict.fromkeys(("Dns", "DnsOptions", "DnsSearch", "ExtraHosts"), (_strings, "a list of strings")),
    **dict.fromkeys(("CapAdd", "Binds"), (_strings, "a list of strings")),
    "Mounts": (_objects, "a list of dicts"),
}
"""What the keys of a host config take that every agent knows (Engine API, HostConfig)."""


def _host_config(value: Any) -> Any:
    what = "DockerRun: host_config"
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FlowError(f"{what} takes a dict; got {type(value).__name__}")
    for key, content in value.items():
        if not isinstance(key, str):
            raise FlowError(f"{what} takes a dict by strings; got {key!r}")
        fits, expected = _HOST_CONFIG.get(key, (None, ""))
        if fits is not None and not fits(content):
            raise FlowError(f"{what}: {key} takes {expected}; got {content!r}")
    return plain(dict(value), what)


def _listed(value: Any, what: str, example: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise FlowError(f"{what} takes a list of {example}; got {value!r}")
    return list(value)


class DockerRun(RunConfig):
    """A container on the agent's Docker engine.

    Without ``image`` it is the agent's default one. ``volumes`` are ``"source:target[:ro]"``; ``host_config``
    holds keys of the Engine API, of which the agent decides which it allows; ``ports`` are exposed, not
    published. With ``resolve="agent"`` the agent fetches the flow and hands it in, so that the image needs
    nothing but a ``python`` and gets no credentials; with ``"container"`` the image has flowagent, which
    fetches the flow with the container's own credentials. ``limits`` are those of a LocalRun.
    """

    fields: ClassVar[tuple[str, ...]] = (
        "image",
        "ports",
        "host_config",
        "volumes",
        "resolve",
        "python",
        "limits",
    )
    runners: ClassVar[tuple[str, ...]] = ("docker",)

    def __init__(
        self,
        image: str | None = None,
        env: Mapping[str, str] | None = None,
        labels: Iterable[str] | None = None,
        ports: Iterable[int] | None = None,
        host_config: Mapping[str, Any] | None = None,
        volumes: Iterable[str] | None = None,
        *,
        resolve: str = "agent",
        python: str | None = None,
        limits: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(env, labels, **options)
        self.image = text(image, "DockerRun: image")
        self.ports = [
            _port(port, "DockerRun: ports") for port in _listed(ports, "DockerRun: ports", "TCP ports")
        ]
        self.host_config = _host_config(host_config)
        self.volumes = _listed(volumes, "DockerRun: volumes", "'source:target[:ro]'")
        for volume in self.volumes:
            if text(volume, "DockerRun: volumes, each of them,") is None:
                raise FlowError("DockerRun: volumes, each of them, takes a non-empty string; got None")
        if resolve not in ("agent", "container"):
            raise FlowError(f"DockerRun: resolve is 'agent' or 'container'; got {resolve!r}")
        self.resolve = resolve
        self.python = text(python, "DockerRun: python")
        self.limits = checked_limits(limits, "DockerRun: limits")


class KubernetesRun(RunConfig):
    """A Kubernetes job, whose pod runs the flow in an image that has flowagent.

    ``job_template`` is a part of a Job, as a dict or YAML, which is laid over the agent's own, and says only
    what stays in its pod; the container in which the flow runs is named ``flow``. A local
    ``job_template_path`` is read when the flow is registered, a URL by the agent before each attempt. All
    other arguments go before any template.
    """

    fields: ClassVar[tuple[str, ...]] = (
        "job_template_path",
        "job_template",
        "image",
        "cpu_limit",
        "cpu_request",
        "memory_limit",
        "memory_request",
        "service_account_name",
        "image_pull_secrets",
        "image_pull_policy",
    )
    runners: ClassVar[tuple[str, ...]] = ("kubernetes",)
    pull_policies: ClassVar[tuple[str, ...]] = ("Always", "IfNotPresent", "Never")

    def __init__(
        self,
        job_template_path: str | os.PathLike[str] | None = None,
        job_template: Mapping[str, Any] | str | None = None,
        image: str | None = None,
        env: Mapping[str, str] | None = None,
        cpu_limit: float | str | None = None,
        cpu_request: float | str | None = None,
        memory_limit: int | str | None = None,
        memory_request: int | str | None = None,
        service_account_name: str | None = None,
        image_pull_secrets: Iterable[str] | None = None,
        labels: Iterable[str] | None = None,
        image_pull_policy: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(env, labels, **options)
        if job_template_path is not None and job_template is not None:
            raise FlowError(
                "KubernetesRun: job_template and job_template_path exclude each other; give only one"
            )
        by_url = isinstance(job_template_path, str) and "://" in job_template_path
        self.job_template_path = (
            job_template_path if by_url else absolute(job_template_path, "KubernetesRun: job_template_path")
        )
        if job_template is not None and not isinstance(job_template, (Mapping, str)):
            raise FlowError(
                f"KubernetesRun: job_template takes a dict or YAML; got {type(job_template).__name__}"
            )
        as_data = dict(job_template) if isinstance(job_template, Mapping) else job_template
        self.job_template = plain(as_data, "KubernetesRun: job_template")
        self.image = text(image, "KubernetesRun: image")
        self.cpu_limit = self._quantity(cpu_limit, "cpu_limit")
        self.cpu_request = self._quantity(cpu_request, "cpu_request")
        self.memory_limit = self._quantity(memory_limit, "memory_limit")
        self.memory_request = self._quantity(memory_request, "memory_request")
        self.service_account_name = text(service_account_name, "KubernetesRun: service_account_name")
        self.image_pull_secrets = names(image_pull_secrets, "KubernetesRun: image_pull_secrets")
        if image_pull_policy is not None and image_pull_policy not in self.pull_policies:
            policies = ", ".join(self.pull_policies)
            raise FlowError(
                f"KubernetesRun: image_pull_policy is one of {policies}; got {image_pull_policy!r}"
            )
        self.image_pull_policy = image_pull_policy

    @staticmethod
    def _quantity(value: float | str | None, name: str) -> str | None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return text(str(value) if number else value, f"KubernetesRun: {name}")  # type: ignore[arg-type]


_MISSING = {
    "ECSRun": "run an agent on the cluster and use DockerRun",
    "VertexRun": "run an agent on the machine and use LocalRun or DockerRun",
}


def __getattr__(name: str) -> Any:
    if name in _MISSING:
        # not AttributeError: ``from flowagent.run_configs import ...`` would replace its message
        raise ImportError(f"flowagent.run_configs has no {name}; {_MISSING[name]}")
    raise AttributeError(f"module 'flowagent.run_configs' has no attribute {name!r}")
