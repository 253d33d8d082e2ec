"""What runners have in common that execute attempts in containers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowagent.docker import parse
from flowagent.errors import SandboxError, UsageError
from flowagent.models import Json
from flowagent.runners.protocol import Order
from flowagent.runtime.limits import Limits
from flowagent.settings import Settings

IMAGE_ID = "sha256:"
"""How the id of an image begins that has no name in any registry."""
EXECUTE = ("flowagent", "execute", "--spec")
"""What runs a flow in an image that has flowagent; the brief, or - for standard input, comes next."""


def limits_of(settings: Settings) -> Limits:
    """What every run may use at the most."""
    return Limits().tightened({name: most for name, most in settings.max.items() if most is not None})


def check_image(image: str | None, allowed: tuple[str, ...] | None) -> None:
    """:raises SandboxError: an image is named that may not be used. ``allowed``: registries; None: any."""
    if image is None or allowed is None:
        return
    if image.startswith(IMAGE_ID):
        raise SandboxError(
            f"the flow's image {image[:19]} is from no registry, and this agent allows only "
            f"{', '.join(allowed)}; register it with registry_url="
        )
    try:
        good = parse(image).allowed(allowed)
    except UsageError as error:
        raise SandboxError(str(error)) from None
    if not good:
        raise SandboxError(
            f"image {image} is from a registry that this agent does not allow; allowed: {', '.join(allowed)}"
        )


def furnish(order: Order, plan: Mapping[str, Json]) -> dict[str, Json]:
    """The plan without paths of this machine: where the flow runs, only the container knows."""
    source = {**plan["source"], "directory": str(order.origin)}
    return {**plan, "source": source, "import_paths": [], "working_dir": None}


def brief(order: Order, limits: Limits, boot_id: str, *, resolves: bool) -> dict[str, Any]:
    """What the container is to execute; see :mod:`flowagent.runtime.container`. Memory and processes are
    limited by what runs the container."""
    return {
        "spec": order.run.read_spec(),
        "storage": order.storage if resolves else None,
        "files": None,
        "secrets": dict(order.values),
        "limits": limits._replace(memory=None, processes=None)._asdict(),
        "grace": order.grace,
        "deadline": order.run.read_lease(),
        "boot_id": boot_id,
    }
