"""The tree of errors that a user of flowagent can meet.

Every message is one line: what failed, for which flow, storage or run, and what to do next.

    FlowagentError
    ├── FlowError (flowagent.flows.errors: raised next to user code, stdlib-only)
    ├── UsageError            what was asked for cannot be: a bad argument, parameter, label or file
    │   └── NotFoundError     no such flow, run, secret …
    ├── SettingsError         the configuration file or environment is wrong
    ├── SecretError           a secret is missing or not readable
    ├── StoreError            the store failed
    │   ├── StoreUnavailableError   it cannot be reached now; a retry can help
    │   └── LeaseLostError          another agent owns the attempt, or its lease ran out
    ├── BackendError          a storage could not be resolved, materialised or written
    │   ├── StorageNotFoundError    the bucket, object, ref or file does not exist
    │   └── StorageTransientError   a retry can help
    ├── SourceCacheError      the source cache could not publish a source
    ├── SandboxError          a flow asks for what this agent cannot, or will not, give
    ├── LauncherError         a flow process could not be started
    ├── AgentError            an agent could not do what it was started for
    └── HookError             a hook of the operator refused, or failed
"""

from __future__ import annotations

from flowagent.flows.errors import FlowagentError, FlowError

__all__ = [
    "AgentError",
    "BackendError",
    "FlowError",
    "FlowagentError",
    "HookError",
    "LauncherError",
    "LeaseLostError",
    "NotFoundError",
    "SecretError",
    "SettingsError",
    "SourceCacheError",
    "StorageNotFoundError",
    "StorageTransientError",
    "StoreError",
    "StoreUnavailableError",
    "UsageError",
    "one_line",
]


def one_line(text: str, most: int = 300) -> str:
    """What somebody else says, as it can stand in a message: short, and nothing that a terminal obeys."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text[: most * 16])
    return " ".join(printable.split())[:most]


class UsageError(FlowagentError):
    """What was asked for cannot be done as asked."""


class NotFoundError(UsageError):
    """The named flow, run, agent or secret does not exist."""


class SettingsError(FlowagentError):
    """The configuration file, the environment or a flag is wrong."""


class SecretError(FlowagentError):
    """A secret is missing, or its file is not safe to read."""


class StoreError(FlowagentError):
    """The store refused or failed an operation."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached at the moment; trying again can help."""


class LeaseLostError(StoreError):
    """The attempt belongs to another agent now, or its lease ran out: nothing may be written for it."""


class BackendError(FlowagentError):
    """A storage could not be resolved, materialised or written.

    ``retryable`` says whether trying again, with nothing changed, can help.
    """

    retryable = False


class StorageNotFoundError(BackendError):
    """What the storage points at does not exist."""


class StorageTransientError(BackendError):
    """The storage failed in a way that may pass."""

    retryable = True


class SourceCacheError(FlowagentError):
    """A source could not be published in the cache (disk full, lock not free in time)."""


class SandboxError(FlowagentError):
    """A flow demands an isolation, or asks for a right, that this agent does not have or give."""


class LauncherError(FlowagentError):
    """A flow process could not be started: by the launcher, or by the engine in a container."""

    retryable = True


class AgentError(FlowagentError):
    """An agent could not do what it was started for."""


class HookError(FlowagentError):
    """A hook refused a source or a run, or could not be run. ``retryable``: it may think better of it."""

    def __init__(self, message: str, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable
