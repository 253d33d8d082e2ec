"""Kubernetes: its API over HTTP, and what an agent needs to be in a cluster."""

from flowagent.kubernetes.client import Cluster, ClusterError

__all__ = ["Cluster", "ClusterError"]
