"""What an image is asked when it is built: whether the flow in it can be loaded there."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from flowagent.flows.errors import FlowError
from flowagent.runtime import loader

FOUND = "flowagent found "
"""What the line begins with that says what was found."""


def main(arguments: Sequence[str]) -> None:
    """Load the flow of a source (JSON, as :func:`flowagent.runtime.loader.load` takes it) by its name."""
    source, name = arguments
    try:
        loaded = loader.load(json.loads(source), name)
    except FlowError as error:
        sys.exit(f"the flow cannot be loaded in the image: {error}")
    found = {"python": list(sys.version_info[:2]), "flow": loaded.flow.name}
    sys.stdout.write(f"{FOUND}{json.dumps(found)}\n")
