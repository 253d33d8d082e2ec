"""The kubernetes runner: a job for each attempt."""

from flowagent.runners.kubernetes.runner import KubernetesRunner

__all__ = ["KubernetesRunner"]
