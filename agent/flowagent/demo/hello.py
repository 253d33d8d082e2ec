"""The flow of ``flowagent demo``: it greets whom it is given, with what the file next to it says."""

from pathlib import Path

from flowagent import Flow, Parameter, get_logger, task
from flowagent.results import LocalResult

GREETING = Path(__file__).with_name("greeting.txt")
LENGTH = len(GREETING.read_text())  # the top level of a script runs at each execution


@task
def read_greeting() -> str:
    print(f"{GREETING.name} has {LENGTH} characters")  # noqa: T201 - to show where output goes
    return GREETING.read_text().strip()


@task
def greet(greeting: str, who: str) -> str:
    get_logger().info("greeting %s", who)
    return f"{greeting}, {who}!"


with Flow("hello", result=LocalResult(serializer="json")) as flow:
    greet(read_greeting(), Parameter("who", default="world"))
