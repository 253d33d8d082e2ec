"""Docker Engine: its API over HTTP, references of images, and credentials of registries."""

from flowagent.docker import images
from flowagent.docker.client import BrokenLogError, Channel, Engine, EngineError
from flowagent.docker.references import Reference, parse

__all__ = ["BrokenLogError", "Channel", "Engine", "EngineError", "Reference", "images", "parse"]
