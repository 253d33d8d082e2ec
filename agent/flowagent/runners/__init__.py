"""How an attempt is executed.

``process``: forked by a launcher here; ``docker``: in a container; ``kubernetes``: in a pod.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowagent.runners.protocol import Runner
    from flowagent.settings import Settings


def make_runner(settings: Settings, directory: Path) -> Runner:
    """The runner that the settings name. ``directory`` is the agent's own.

    :raises SettingsError: this machine does not have what the settings ask for."""
    if settings.runner == "docker":
        from flowagent.runners.docker import DockerRunner

        return DockerRunner(settings, directory)
    if settings.runner == "kubernetes":
        from flowagent.runners.kubernetes import KubernetesRunner

        return KubernetesRunner(settings, directory)
    from flowagent.runners.confinement import Confinement
    from flowagent.runners.process import ProcessRunner

    confinement = Confinement(settings, directory / "runs")
    return ProcessRunner(directory, settings.home / "ground", confinement, settings.preload)
