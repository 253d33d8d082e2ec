"""What somebody may have meant who named something that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

MOST = 3
MANY = 2000
"""Names that are compared; each takes some microseconds."""


def near(name: str, names: Sequence[str]) -> str:
    """The end of an error: the nearest of ``names``, or some of them."""
    names = [other for other in names[: MANY * 10] if other.isprintable()][:MANY]  # others may have made them
    close = difflib.get_close_matches(name, names, MOST, 0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    if not names:
        return "; there are none"
    more = ", …" if len(names) > MOST else ""
    return f"; there are {', '.join(sorted(names)[:MOST])}{more}"


def near_path(path: str, paths: Sequence[str]) -> str:
    """As :func:`near`, for a file that may be in another directory."""
    name = path.rpartition("/")[2]
    same = [other for other in paths if other.rpartition("/")[2] == name and other.isprintable()]
    return f"; did you mean {' or '.join(sorted(same)[:MOST])}?" if same else near(path, paths)
