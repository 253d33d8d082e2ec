"""The docker runner: each attempt in a container of its own, on any Docker engine."""

from flowagent.runners.docker.runner import DockerRunner

__all__ = ["DockerRunner"]
