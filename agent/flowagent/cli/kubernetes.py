"""``kubernetes``: agents that run flows in pods, and what they need in a cluster."""

from __future__ import annotations

import click

import flowagent
from flowagent import labels as label_names
from flowagent.cli.session import Command, Session, pass_session
from flowagent.cli.start import for_runner
from flowagent.errors import UsageError


@click.group()
def kubernetes() -> None:
    """Run flows in pods of a Kubernetes cluster."""


kubernetes.add_command(for_runner("kubernetes", "pods of a Kubernetes cluster"))


@kubernetes.command(cls=Command)
@click.option("--name", default="flowagent", metavar="NAME", help="Of the agent and its objects. [flowagent]")
@click.option("--namespace", default="default", metavar="NAME", help="Where it is. [default]")
@click.option("--job-namespace", metavar="NAME", help="Where it makes jobs. [where it is]")
@click.option("--image", metavar="IMAGE", help="Of the agent. [flowagent:VERSION]")
@click.option("--job-image", metavar="IMAGE", help="For runs that name none. [the agent's]")
@click.option(
    "-l", "--labels", multiple=True, metavar="LABEL[,LABEL...]", help="What the agent carries. Repeatable."
)
@click.option("--storage", default="5Gi", metavar="SIZE", help="Of the agent's volume. [5Gi]")
@pass_session
def manifest(
    session: Session,
    name: str,
    namespace: str,
    job_namespace: str | None,
    image: str | None,
    job_image: str | None,
    labels: tuple[str, ...],
    storage: str,
) -> None:
    """Print what an agent in a cluster needs, for kubectl apply -f -.

    A Deployment with its volume, and a ServiceAccount with a Role that allows what the agent does, and no
    more. With --job-namespace the Role is there, and flows do not reach what the agent has in its own
    namespace. Where the store is, a Secret of the agent's name has to say:

    kubectl create secret generic flowagent --from-literal=store=postgresql://...
    """
    from flowagent.kubernetes import manifest as objects

    try:
        import yaml
    except ImportError as error:
        raise UsageError(
            "this takes a package that is not installed: install flowagent[kubernetes]"
        ) from error
    own = image or f"flowagent:{flowagent.__version__}"
    found = objects.manifest(
        name=name,
        namespace=namespace,
        image=own,
        labels=label_names.parse(list(labels)),
        job_image=job_image or own,
        storage=storage,
        job_namespace=job_namespace,
    )
    yaml.SafeDumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]
    click.echo(yaml.safe_dump_all(found, sort_keys=False), nl=False)
