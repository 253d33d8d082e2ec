"""What containers are made with: the agent's rules, and of a run config what they allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flowagent.errors import FlowError, SandboxError, SettingsError
from flowagent.models import Json
from flowagent.run_configs import DockerRun
from flowagent.runners.contained import limits_of
from flowagent.runners.docker.volumes import GROUND, Volume
from flowagent.runtime.limits import Limits
from flowagent.settings import Settings

GROUND_LABEL = "flowagent.ground"
"""Of the volumes that hold it, and of the containers that fill them."""
SUPERVISION = 16
"""Processes that init and supervisor may need beside the flow's."""
HARMLESS = frozenset(
    {
        "Memory", "MemoryReservation", "NanoCpus", "CpuShares", "CpuPeriod", "CpuQuota", "CpusetCpus",
        "PidsLimit", "ShmSize", "ReadonlyRootfs", "Tmpfs", "Dns", "DnsOptions", "DnsSearch", "ExtraHosts",
    }
)  # fmt: skip
"""Keys of a host config that a flow may set: none of them reaches beyond its container."""
AT_MOST = {"Memory": "memory", "PidsLimit": "processes"}
"""Keys that are limits of the agent's, which a flow can only lower."""


class Rules:
    """What one agent makes containers with.

    :raises SettingsError: the settings name something that cannot be."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.limits = limits_of(settings)
        self._volumes = [Volume.parse(each, SettingsError).on_host() for each in settings.volumes]
        for key in settings.allow_host_config:
            if key in CONFINED:
                raise SettingsError(f"--allow-host-config {key}: {FIXED}; leave it out")

    def check(self, config: Mapping[str, Json]) -> None:
        """:raises SandboxError: a run config asks for what this agent does not allow, or cannot be."""
        try:  # again: it comes from the store, and whoever put it there may have gone another way
            DockerRun(**{name: config[name] for name in DockerRun.fields if name in config})
        except FlowError as error:
            raise SandboxError(str(error)) from None
        for key in config.get("host_config") or {}:
            if key in CONFINED:
                raise SandboxError(f"the flow asks for {key} in its host_config: {FIXED}; leave it out")
            if key not in HARMLESS and key not in self._settings.allow_host_config:
                raise SandboxError(
                    f"the flow asks for {key} in its host_config, which this agent does not allow; "
                    f"start one with --allow-host-config {key}"
                )
        for volume in self._asked(config):
            self._check_volume(volume)

    def limits_of(self, config: Mapping[str, Json]) -> Limits:
        """The limits of a run: the agent's, where its flow does not ask for less."""
        asked = dict(config.get("limits") or {})
        host = config.get("host_config") or {}
        for key, name in AT_MOST.items():
            if isinstance(host.get(key), int) and host[key] > 0:
                asked[name] = min(host[key], asked.get(name, host[key]))
        if config.get("timeout"):
            asked["wall_time"] = min(config["timeout"], asked.get("wall_time", config["timeout"]))
        return self.limits.tightened(asked)

    def networks(self, config: Mapping[str, Json]) -> tuple[str, ...]:
        """What a container is in: the agent's networks, unless its flow was allowed to name one."""
        named = (config.get("host_config") or {}).get("NetworkMode")
        return (named,) if named else self._settings.networks or ("default",)

    def container(
        self,
        image: str,
        command: list[str],
        config: Mapping[str, Json],
        labels: Mapping[str, str],
        ground: str | None,
    ) -> dict[str, Any]:
        """The body that a container is created with (Engine API, ContainerCreate)."""
        limits = self.limits_of(config)
        host = {key: value for key, value in (config.get("host_config") or {}).items() if key not in AT_MOST}
        mounts = [volume.mount for volume in (*self._volumes, *self._asked(config))]
        if ground is not None:
            # should it have to be made anew: nothing of the image's gets into it
            options = {"NoCopy": True, "Labels": {GROUND_LABEL: ""}}
            mounts.append({**Volume(ground, GROUND, writable=False).mount, "VolumeOptions": options})
        host = {
            **host,
            **CONFINED,
            "Mounts": [*mounts, *host.get("Mounts", ())],
            "CapAdd": host.get("CapAdd", []),
            "NetworkMode": self.networks(config)[0],
            "PidsLimit": limits.processes + SUPERVISION if limits.processes else 0,
        }
        if limits.memory:
            host = {"MemorySwap": limits.memory, **host, "Memory": limits.memory}
        return {
            "Image": image,
            "Entrypoint": command,
            "Cmd": [],
            "Labels": dict(labels),
            "OpenStdin": True,
            "StdinOnce": False,
            "AttachStdin": True,
            "Tty": False,
            "ExposedPorts": {f"{port}/tcp": {} for port in config.get("ports") or ()},
            "HostConfig": host,
            "StopSignal": "SIGTERM",
        }

    def _asked(self, config: Mapping[str, Json]) -> Iterable[Volume]:
        return [
            Volume.parse(each, SandboxError).in_full(SandboxError) for each in config.get("volumes") or ()
        ]

    def _check_volume(self, volume: Volume) -> None:
        if not volume.is_path:
            of_name = [each for each in self._volumes if each.source == volume.source]
            if any(each.writable or not volume.writable for each in of_name):
                return
            how, mode = (" to write to", "") if of_name else ("", "" if volume.writable else ":ro")
            raise SandboxError(
                f"the flow asks for volume {volume.source}{how}, which this agent does not allow; "
                f"start one with --volume {volume.source}:{volume.target}{mode}"
            )
        allowed = self._settings.allow_write
        if not volume.writable:
            allowed = (*allowed, *self._settings.allow_read)
        # Exactly that path: below it, flows could have put links to elsewhere.
        if volume.source not in map(str, allowed):
            kind = "write" if volume.writable else "read"
            raise SandboxError(
                f"the flow asks for {volume.source}, which this agent does not allow; "
                f"start one with --allow-{kind} {volume.source}"
            )


CONFINED: Mapping[str, Any] = {
    "Init": True,
    "CapDrop": ["ALL"],
    "SecurityOpt": ["no-new-privileges"],
    "AutoRemove": False,
    "RestartPolicy": {"Name": "no"},
    # the log is the spool: it must not be cut short by what the engine does by default
    "LogConfig": {"Type": "json-file", "Config": {"max-size": "1000g", "max-file": "1"}},
}
"""What no run config can change."""
FIXED = "it is the same for all containers of flows"
