"""Storages: where a flow's definition lives. Plain data; the drivers are in ``flowagent_backends``."""

from __future__ import annotations

from typing import Any

from flowagent.storage.base import Storage
from flowagent.storage.buckets import GCS, S3, Azure
from flowagent.storage.docker import Docker
from flowagent.storage.files import Local, Module
from flowagent.storage.forges import Bitbucket, CodeCommit, GitHub, GitLab
from flowagent.storage.git import Git
from flowagent.storage.webhook import Webhook

__all__ = [
    "GCS",
    "S3",
    "Azure",
    "Bitbucket",
    "CodeCommit",
    "Docker",
    "Git",
    "GitHub",
    "GitLab",
    "Local",
    "Module",
    "Storage",
    "Webhook",
]


def __getattr__(name: str) -> Any:
    there = " and ".join(", ".join(sorted(set(__all__) - {"Storage"})).rsplit(", ", 1))
    raise AttributeError(f"module 'flowagent.storage' has no attribute {name!r}; there are {there}")
