"""Hooks of a running agent, and the secrets of the flows that they are run for."""

from __future__ import annotations

import pytest
from tests.e2e.harness import Site
from tests.e2e.operating import executable

SECRETIVE = """
    from flowagent import flow
    from flowagent.storage import Local

    @flow(secrets=["TOKEN"], storage=Local(stored_as_script=False))
    def secretive():
        pass
"""


@pytest.mark.parametrize("event", ["before-source", "before-run", "after-run"])
def test_what_a_hook_says_has_no_secrets_of_the_flow_in_it(site: Site, event: str) -> None:
    site.command("register", site.write("secretive.py", SECRETIVE))
    secret = {"FLOWAGENT_SECRET_TOKEN": "hunter2"}
    hook = executable(site.root / "hooks" / event, "#!/bin/sh\necho the token hunter2 is stale\nexit 1\n")
    run = site.submit("secretive")
    done = site.command("start", "--once", "--hooks", hook.parent, env=secret)
    shown = site.show(run)
    if event == "after-run":
        assert shown["state"] == "completed"
    else:
        why = f"could not be started: the hook {event} refused: the token **** is stale"
        assert (shown["state"], shown["reason"]) == ("crashed", why)
    assert f"the hook {event} refused: the token **** is stale" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr + site.command("show", run).stdout
