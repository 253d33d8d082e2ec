"""Runs in pods of a real cluster: what comes out of them, how they end, and what goes away meanwhile."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
import yaml
from tests.containers.machinery import BARE
from tests.containers.test_runs import text
from tests.e2e.harness import Site, until
from tests.gitservers import Repository, open_directory, sshd
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.flows import AGENT, NAMESPACE, begun, job_of, jobs, register, start

# -- what comes out ------------------------------------------------------------------------------------


def test_a_flow_runs_in_a_pod(yard: Site, field: Cluster) -> None:
    yard.write("side.txt", "next to the script")
    yard.command("secret", "set", "COLOUR", input="green")
    path = yard.sources / "plain.py"
    path.write_text(
        """
import os
from pathlib import Path
from flowagent import Flow, Parameter, Secret, context, task
from flowagent.run_configs import KubernetesRun
from flowagent.storage import Local

@task
def work(n, colour):
    print(Path(__file__).with_name("side.txt").read_text(), os.environ["MODE"], len(colour), context.attempt)
    print("\\N{SNOWMAN}" * 3, flush=True)
    os.write(1, bytes(range(256)) + b"\\n")
    return n + 1

with Flow("plain", storage=Local(stored_as_script=True, add_default_labels=False),
          run_config=KubernetesRun(env={"MODE": "careful"})) as flow:
    work(Parameter("n", 1), Secret("COLOUR"))
"""
    )
    yard.command("register", path)
    run = yard.submit("plain", "-p", "n=41")
    shown = yard.wait_for(run, timeout=60)
    assert shown["state"] == "completed", (shown, text(yard, run))
    assert text(yard, run).startswith("next to the script careful 5 1\n☃☃☃\n")
    assert shown["attempts"][0]["sandbox"] == "container"
    assert shown["attempts"][0]["peak_memory"] > 1 << 20
    assert shown["attempts"][0]["revision"]
    assert "42" in yard.command("result", run).stdout
    until(lambda: job_of(run) not in jobs(field))


def test_long_output_comes_whole(yard: Site) -> None:
    register(yard, "long", "for i in range(60000): print(i, 'x' * 40)")
    run = yard.submit("long")
    assert yard.wait_for(run, timeout=90)["state"] == "completed"
    assert text(yard, run) == "".join(f"{i} {'x' * 40}\n" for i in range(60000))


SSH_KEYS = """
apiVersion: batch/v1
kind: Job
spec:
  template:
    spec:
      containers:
      - name: flow
        volumeMounts:
        - name: ssh-key
          readOnly: true
          mountPath: "/root/.ssh"
      volumes:
      - name: ssh-key
        secret:
          secretName: my-ssh-key
          optional: false
          defaultMode: 0600
"""
"""As the storage documentation has it."""


def test_a_git_flow_with_ssh_keys_from_a_secret(site: Site, field: Cluster) -> None:
    template = yaml.safe_load((site.root / "template.yaml").read_text())
    template["spec"]["template"]["spec"]["hostNetwork"] = True  # the agent's own may have it
    (site.root / "template.yaml").write_text(yaml.safe_dump(template))
    address = field.node.address
    with open_directory() as root:
        repository = Repository.make(root / "repos", "one", flow=GIT_FLOW.format(keys=SSH_KEYS))
        repository.commit(**{"person.txt": "Marvin"})
        with sshd(root / "repos", root / "client" / ".ssh", f"ListenAddress {address}") as server:
            url = server.url("one").replace("127.0.0.1", address)
            held = {
                "id_ed25519": (server.directory / "id_ed25519").read_text(),
                "known_hosts": server.known_host.replace("127.0.0.1", address) + "\n",
            }
            secret = {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "my-ssh-key"},
                "stringData": held,
            }
            field.apply({**secret, "metadata": {"name": "my-ssh-key", "namespace": NAMESPACE}})
            start(site)
            site.command("register", repository.work / "flow.py")
            run = site.submit("from-git", "--env", f"FLOWAGENT_SECRET_URL={url}")
            shown = site.wait_for(run, timeout=60)
            assert shown["state"] == "completed", (shown, text(site, run))
            assert text(site, run) == "hello Marvin\n"
            assert shown["attempts"][0]["revision"] == repository.head


GIT_FLOW = """
from pathlib import Path
from flowagent import flow
from flowagent.run_configs import KubernetesRun
from flowagent.storage import Git

@flow(name="from-git", storage=Git("flow.py", git_clone_url_secret_name="URL"),
      run_config=KubernetesRun(job_template='''{keys}'''))
def from_git():
    print("hello", Path(__file__).with_name("person.txt").read_text())
"""


def test_twenty_pods_at_once(site: Site) -> None:
    start(site, "--limit", "20")
    register(site, "many", "print('one of many')")
    runs = [site.submit("many") for _ in range(20)]
    for run in runs:
        assert site.wait_for(run, timeout=180)["state"] == "completed", site.show(run)["reason"]
        assert text(site, run) == "one of many\n"


# -- how they end --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body", "config", "state", "reason"),
    [
        ("raises", "raise ValueError('no good')", "", "failed", "ValueError: no good"),
        ("exits", "os._exit(3)", "", "failed", "exited with code 3 before the flow had ended"),
        ("killed", "os.kill(os.getpid(), 9)", "", "crashed", "killed by SIGKILL"),
        (
            "hungry",
            "x = [bytearray(1 << 20) for _ in range(4096)]",
            "memory_limit='200Mi'",
            "crashed",
            "out of memory (its limit is 200M)",
        ),
        ("slow", "time.sleep(60)", "timeout=1", "failed", "timed out after 1 s"),
        (
            "overdue",
            "print('ready', flush=True); time.sleep(60)",
            "job_template={'spec': {'activeDeadlineSeconds': 6}}",
            "failed",
            "timed out after 6 s, by its job template",
        ),
        (
            "unpulled",
            "pass",
            "image='127.0.0.1:1/no/such:1'",
            "crashed",
            "image 127.0.0.1:1/no/such:1 cannot be pulled: the registry cannot be reached",
        ),
        ("misnamed", "pass", "image='UPPER::case'", "crashed", "UPPER::case"),
        ("bare", "pass", f"image={BARE!r}", "crashed", "its image has no flowagent"),
        (
            "greedy",
            "pass",
            "cpu_request=1000",
            "crashed",
            "no node takes its pod: 0/1 nodes are available: 1 Insufficient cpu. (waited 6 s)",
        ),
        (
            "keyless",
            "pass",
            "job_template=MISSING",
            "crashed",
            'secret "missing" not found',
        ),
        ("nobodys", "pass", "service_account_name='nobody-has-made'", "crashed", "nobody-has-made"),
        (
            "malformed",
            "pass",
            "job_template={'spec': {'ttlSecondsAfterFinished': 'soon'}}",
            "crashed",
            "the cluster does not take its job",
        ),
        (
            "reaching",
            "pass",
            "job_template={'spec': {'template': {'spec': {'hostNetwork': True}}}}",
            "crashed",
            "asks for spec.template.spec.hostNetwork: True, which is not for flows to set",
        ),
        ("impostor", "pass", f"service_account_name={AGENT!r}", "crashed", "which is an agent's own"),
    ],
)
def test_ends_are_told_apart(yard: Site, name: str, body: str, config: str, state: str, reason: str) -> None:
    register(yard, name, body, config)
    run = yard.submit(name)
    shown = yard.wait_for(run, timeout=60)
    assert (shown["state"], reason in shown["reason"]) == (state, True), (shown["reason"], text(yard, run))


def test_why_a_pod_waits_is_seen_at_once(site: Site) -> None:
    start(site)
    register(site, "waiting", "pass", "cpu_request=1000")
    run = site.submit("waiting")
    until(lambda: "waiting: no node takes its pod" in site.command("logs", run).stdout, 20)
    assert site.state(run) == "running"
    site.command("cancel", run)
    assert site.wait_for(run)["state"] == "cancelled"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (
            lambda cluster, job, pod: cluster.delete("Job", job, NAMESPACE),
            "its job was deleted by somebody else",
        ),
        (lambda cluster, job, pod: cluster.delete("Pod", pod, NAMESPACE, grace=1), "its pod was deleted"),
    ],
    ids=["job", "pod"],
)
def test_what_others_do_to_it(
    yard: Site, field: Cluster, what: Callable[[Cluster, str, str], None], reason: str
) -> None:
    register(yard, "victim", "print('ready', flush=True); time.sleep(100)")
    run = yard.submit("victim")
    begun(yard, run)
    what(field, job_of(run), field.pod_of(job_of(run), NAMESPACE)["metadata"]["name"])
    shown = yard.wait_for(run, timeout=40)
    assert (shown["state"], reason in shown["reason"]) == ("crashed", True), shown["reason"]


def test_an_eviction(yard: Site) -> None:
    register(
        yard,
        "large",
        "open('/volume/file', 'wb').write(bytes(50 << 20)); print('ready', flush=True); time.sleep(200)",
        "job_template=SMALL",
    )
    shown = yard.wait_for(yard.submit("large"), timeout=90)
    assert shown["state"] == "crashed"
    assert shown["reason"].startswith("Evicted from node node: Usage of EmptyDir volume"), shown["reason"]


def test_a_pod_that_is_made_anew_begins_nothing(yard: Site, field: Cluster) -> None:
    register(yard, "once", "print('ready', flush=True); time.sleep(8); print('still here', flush=True)")
    run = yard.submit("once")
    begun(yard, run)
    assert not [each for each in field.list("Secret", NAMESPACE) if each["metadata"]["name"] == job_of(run)]
    pod = field.pod_of(job_of(run), NAMESPACE)["metadata"]["name"]
    field.delete("Pod", pod, NAMESPACE, grace=0)
    assert "its pod was deleted" in yard.wait_for(run, timeout=40)["reason"]
    assert text(yard, run).count("ready") == 1
    until(lambda: job_of(run) not in jobs(field))


def test_cancelling_asks_then_kills(yard: Site, field: Cluster) -> None:
    register(
        yard,
        "polite",
        """
def on_term(*_):
    print("asked to end", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, on_term)
print("ready", flush=True)
time.sleep(60)
""",
    )
    register(
        yard,
        "deaf",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)",
    )
    runs = {name: yard.submit(name) for name in ("polite", "deaf")}
    for run in runs.values():
        begun(yard, run)
        yard.command("cancel", run)
    for run in runs.values():
        shown = yard.wait_for(run, timeout=30)
        assert (shown["state"], shown["reason"]) == ("cancelled", "cancelled by a user"), shown
    assert "asked to end" in text(yard, runs["polite"])
    until(lambda: not {job_of(run) for run in runs.values()} & set(jobs(field)))


def test_what_failed_is_kept_to_be_looked_at(site: Site, field: Cluster) -> None:
    start(site, "--keep", "failed")
    register(site, "bad", "raise SystemExit(1)")
    register(site, "good", "pass")
    bad, good = site.submit("bad"), site.submit("good")
    for run in (bad, good):
        site.wait_for(run, timeout=60)
    until(lambda: job_of(bad) in jobs(field) and job_of(good) not in jobs(field))
    site.stop(site.agents[-1])
    start(site, "--keep", "failed")
    assert job_of(bad) in jobs(field)


# -- what goes away meanwhile --------------------------------------------------------------------------

COUNTING = "for i in range(120): print(i, flush=True); time.sleep(0.1)"
COUNTED = "".join(f"{i}\n" for i in range(120))


def test_an_agent_that_was_killed_finds_its_jobs(site: Site) -> None:
    agent = start(site)
    register(site, "counting", COUNTING)
    run = site.submit("counting")
    begun(site, run, "20\n")
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    time.sleep(2)
    start(site)
    shown = site.wait_for(run, timeout=60)
    assert (shown["state"], shown["attempt"]) == ("completed", 1), shown
    assert text(site, run) == COUNTED


def test_without_an_agent_a_job_ends_with_its_lease(site: Site, field: Cluster) -> None:
    agent = start(site, "--lease", "12s", "--grace", "1s")
    register(site, "endless", "print('ready', flush=True); time.sleep(1000)")
    run = site.submit("endless")
    begun(site, run)
    time.sleep(5)
    assert not field.get("Job", job_of(run), NAMESPACE)["status"].get("conditions"), (
        "the deadline was moved on"
    )
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    died = time.monotonic()
    pod = field.pod_of(job_of(run), NAMESPACE)["metadata"]["name"]
    until(
        lambda: (
            field.request("GET", field.path("Pod", pod, NAMESPACE)).status_code == 404
            or "terminated" in str(field.get("Pod", pod, NAMESPACE)["status"].get("containerStatuses"))
        ),
        25,
    )
    assert time.monotonic() - died < 20
    start(site, "--lease", "12s")
    shown = site.wait_for(run, timeout=40)
    assert shown["state"] == "crashed" and "lease" in shown["reason"], shown


def test_the_api_away_loses_nothing(site: Site, field: Cluster) -> None:
    start(site, "--lease", "40s")
    register(site, "counting", COUNTING)
    run = site.submit("counting")
    begun(site, run, "10\n")
    field.restart_api(away=2)
    shown = site.wait_for(run, timeout=90)
    assert shown["state"] == "completed", shown
    assert text(site, run) == COUNTED


def test_a_lost_node(site: Site, field: Cluster) -> None:
    start(site, "--lease", "60s", "--grace", "1s")
    register(site, "stranded", "print('ready', flush=True); time.sleep(1000)", "job_template=" + repr(HASTY))
    run = site.submit("stranded")
    begun(site, run)
    field.stop_kubelet()
    try:
        shown = site.wait_for(run, timeout=60)
        assert shown["state"] == "crashed" and "node node is lost" in shown["reason"], shown
    finally:
        field.start_kubelet()
        field.wait_ready(60)


HASTY = {
    "spec": {
        "template": {
            "spec": {
                "tolerations": [
                    {
                        "key": f"node.kubernetes.io/{state}",
                        "operator": "Exists",
                        "effect": "NoExecute",
                        "tolerationSeconds": 2,
                    }
                    for state in ("not-ready", "unreachable")
                ]
            }
        }
    }
}
