"""Docker Engine: its API over HTTP, references of images, and credentials of registries."""

from flowagent.docker import images
from flowagent.docker.client import Channel, Engine, EngineError
from flowagent.docker.references import Reference, parse

__all__ = ["Channel", "Engine", "EngineError", "Reference", "images", "parse"]
