"""What an agent has done since it started, in plain numbers: counting them costs next to nothing."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts since ``started`` (seconds since the epoch)."""

    started: float = field(default_factory=time.time)
    claimed: int = 0  # attempts
    claims_failed: int = 0  # times that the store could not be asked for work
    renewals: int = 0  # times that all leases were renewed
    renewals_failed: int = 0
    lost: int = 0  # attempts whose lease was lost
    ended: Counter[str] = field(default_factory=Counter)  # attempts by the state they ended in
    again: int = 0  # of those, how many were scheduled again
    output_bytes: int = 0  # of attempts that have ended
    notices_failed: int = 0  # webhooks that were given up
    vetoes: int = 0  # by hooks
    cancelled_by_drain: int = 0  # attempts that a stopping agent did not wait for any longer

    @property
    def attempts_ended(self) -> int:
        return self.ended.total()
