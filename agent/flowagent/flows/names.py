"""Names made from what users typed, safe in paths, labels and URLs."""

from __future__ import annotations

import hashlib
import re
import unicodedata

LONGEST = 80
"""Characters of a slug: it has to fit a file name, with room for what is put behind it."""


def slug(text: str) -> str:
    """Lower-case ASCII letters and digits with single hyphens between them; never empty.

    Letters are transliterated where Unicode knows how; a text without any, or one that is too long,
    gets a short hash, so that two of them do not meet."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")
    if name and len(name) <= LONGEST:
        return name
    short = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[: LONGEST - 9].rstrip('-')}-{short}" if name else short
