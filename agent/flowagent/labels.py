"""Labels: how they are written, and which agent may take which run."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from flowagent.errors import UsageError

LONGEST = 200
"""Characters of one label."""


def parse(values: Iterable[str]) -> tuple[str, ...]:
    """Labels from a command line or a list, several in one if commas are between; sorted and unique.

    :raises UsageError: one is empty, too long, or has white space or control characters in it."""
    if isinstance(values, str):
        values = [values]
    return tuple(sorted({_checked(part.strip()) for value in values for part in value.split(",")}))


def _checked(label: str) -> str:
    if not label:
        raise UsageError("a label is empty; give names separated by single commas, like host1,gpu")
    if len(label) > LONGEST:
        raise UsageError(
            f"label {label[:20]!r}... has {len(label)} characters; at most {LONGEST} are allowed"
        )
    if not label.isprintable() or any(character.isspace() for character in label):
        raise UsageError(f"label {label!r} has white space or control characters in it; leave them out")
    return label


def common_runners(of_config: Iterable[str], of_storage: Iterable[str]) -> tuple[str, ...]:
    """The runners that can execute a flow, as its run config and its storage say; none means any for each.

    :raises UsageError: there is none that both can be executed by."""
    configs, storages = list(of_config), list(of_storage)
    if not configs or not storages:
        return tuple(configs or storages)
    if both := tuple(name for name in configs if name in storages):
        return both
    raise UsageError(
        f"its run config is for runner {' or '.join(configs)}, and its storage for runner "
        f"{' or '.join(storages)}; no agent can be both: change one of them"
    )


def serves(
    agent_labels: Collection[str],
    require_labels: bool,
    agent_runner: str,
    run_labels: Collection[str],
    run_runners: Collection[str],
) -> bool:
    """Whether an agent may take a run: it carries every label of the run, and has a runner for it."""
    return mismatch(agent_labels, require_labels, agent_runner, run_labels, run_runners) is None


def mismatch(
    agent_labels: Collection[str],
    require_labels: bool,
    agent_runner: str,
    run_labels: Collection[str],
    run_runners: Collection[str],
) -> str | None:
    """Why an agent may not take a run, in words that follow the agent's name; None: it may."""
    reasons = []
    if lacking := sorted(set(run_labels) - set(agent_labels)):
        reasons.append(f"lacks label{'s' * (len(lacking) > 1)} {', '.join(lacking)}")
    if require_labels and not run_labels:
        reasons.append("was started with --require-labels and the run has none")
    if run_runners and agent_runner not in run_runners:
        reasons.append(f"runs {agent_runner} flows only; the run needs {' or '.join(sorted(run_runners))}")
    return "; ".join(reasons) or None
