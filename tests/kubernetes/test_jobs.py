"""What the jobs of a real cluster are made of: by options, job templates and run configs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from tests.containers.test_runs import text
from tests.e2e.harness import Site
from tests.gitservers import free_port
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.flows import NAMESPACE, begun, job_of, jobs, register, start

WHOSE = """
import base64
path = "/var/run/secrets/kubernetes.io/serviceaccount/token"
if not os.path.exists(path):
    print("nobody")
else:
    claims = open(path).read().split(".")[1]
    print(json.loads(base64.urlsafe_b64decode(claims + "=="))["sub"].rpartition(":")[2])
"""
"""A flow that says whose token of the cluster it has."""


def completed(site: Site, name: str, *options: str) -> str:
    """What a run of a flow prints."""
    run = site.submit(name, *options)
    shown = site.wait_for(run, timeout=60)
    assert shown["state"] == "completed", (shown["reason"], text(site, run))
    return text(site, run)


def test_service_accounts(site: Site, field: Cluster) -> None:
    """The one of the flow, or else the agent's."""
    for name in ("robot", "marvin"):
        field.service_account_token(NAMESPACE, name)
    register(site, "plain", WHOSE)
    register(site, "its-own", WHOSE, "service_account_name='marvin'")
    agent = start(site)
    assert completed(site, "plain") == "nobody\n"
    site.stop(agent)
    start(site, "--service-account-name", "robot")
    assert completed(site, "plain") == "robot\n"
    assert completed(site, "its-own") == "marvin\n"


def test_the_context_that_is_named(site: Site, field: Cluster) -> None:
    known = json.loads(Path(site.environment["KUBECONFIG"]).read_text())
    away = {"name": "away", "cluster": {"server": f"http://127.0.0.1:{free_port()}"}}
    known["clusters"].append(away)
    known["contexts"].append({"name": "away", "context": {"cluster": "away", "user": "tests"}})
    path = site.root / "kubeconfig"
    path.write_text(json.dumps({**known, "current-context": "away"}))
    site.environment["KUBECONFIG"] = str(path)
    refused = ("start", "--runner", "kubernetes", "--context", "nowhere")
    assert "nowhere" in site.command(*refused, code=None).stderr
    register(site, "there", "print('ready', flush=True); time.sleep(60)")
    start(site, "--context", "tests")
    run = site.submit("there")
    begun(site, run)
    assert job_of(run) in jobs(field)  # in the namespace of the context


# -- job templates -------------------------------------------------------------------------------------


def template(**fields: Any) -> dict[str, Any]:
    """One with these fields of the container in which the flow runs."""
    return {"spec": {"template": {"spec": {"containers": [{"name": "flow", **fields}]}}}}


def saying(word: str) -> str:
    return yaml.safe_dump({"kind": "Job", **template(env=[{"name": "WORD", "value": word}])})


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """The files of a directory on the web, and where that is."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(directory))) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_template_in_a_file(site: Site) -> None:
    """It is read when the flow is registered."""
    start(site)
    path = site.write("word.yaml", saying("from a file"))
    register(site, "filed", "print(os.environ['WORD'])", f"job_template_path={str(path)!r}")
    path.unlink()
    assert completed(site, "filed") == "from a file\n"


def test_a_template_on_the_web(site: Site) -> None:
    """It is read before each attempt."""
    start(site)
    directory = site.root / "web"
    directory.mkdir()
    path = directory / "word.yaml"
    with served(directory) as url:
        config = f"job_template_path='{url}/word.yaml?key=hunter2'"
        register(site, "linked", "print(os.environ['WORD'])", config)
        path.write_text(saying("at first"))
        assert completed(site, "linked") == "at first\n"
        path.write_text(saying("later"))
        assert completed(site, "linked") == "later\n"
        path.write_text(yaml.safe_dump({"spec": {"template": {"spec": {"hostNetwork": True}}}}))
        assert "asks for spec.template.spec.hostNetwork: True" in refused(site, "linked")
        path.unlink()
        reason = f"job template {url}/word.yaml: the server answers 404; correct job_template_path"
        assert refused(site, "linked") == f"could not be started: {reason}"


def refused(site: Site, name: str) -> str:
    """Why a run was not begun."""
    shown = site.wait_for(site.submit(name), timeout=60)
    assert shown["state"] == "crashed" and "hunter2" not in shown["reason"], shown["reason"]
    return str(shown["reason"])


def variables(**values: str) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def test_what_goes_before_what(site: Site, field: Cluster) -> None:
    """The run config's arguments, the flow's template, the agent's template, the agent's options."""
    own = yaml.safe_load((site.root / "template.yaml").read_text())
    own["spec"]["ttlSecondsAfterFinished"] = 111
    pod = own["spec"]["template"]["spec"]
    pod |= {"hostname": "agents", "subdomain": "agents", "imagePullSecrets": [{"name": "agents"}]}
    pod["containers"][0] |= {
        "env": variables(A="agent's", B="agent's", C="agent's"),
        "resources": {"limits": {"memory": "300Mi", "cpu": "900m", "ephemeral-storage": "2Gi"}},
    }
    (site.root / "template.yaml").write_text(yaml.safe_dump(own))
    asked = template(
        env=variables(B="flow's", C="flow's"),
        resources={"limits": {"memory": "250Mi", "cpu": "800m"}},
        volumeMounts=[{"name": "scratch", "mountPath": "/scratch"}],
    )
    pod = asked["spec"]["template"]["spec"]
    pod |= {"hostname": "flows", "volumes": [{"name": "scratch", "emptyDir": {}}]}
    pod["imagePullSecrets"] = [{"name": "flows"}]
    for name in ("robot", "marvin"):
        field.service_account_token(NAMESPACE, name)
    register(
        site,
        "layered",
        "print([os.environ[name] for name in 'ABC'], 'ready', flush=True); time.sleep(60)",
        f"job_template={asked!r}, memory_limit='200Mi', env={{'C': \"run's\"}}, "
        "service_account_name='marvin', image_pull_secrets=['runs']",
    )
    start(site, "--service-account-name", "robot", "--image-pull-secret", "options")
    run = site.submit("layered")
    begun(site, run)
    assert text(site, run) == """["agent's", "flow's", "run's"] ready\n"""
    job = field.get("Job", job_of(run), NAMESPACE)
    made = job["spec"]["template"]["spec"]
    assert job["spec"]["ttlSecondsAfterFinished"] == 111
    assert made["enableServiceLinks"] is False  # the default
    assert (made["hostname"], made["subdomain"]) == ("flows", "agents")
    assert made["serviceAccountName"] == "marvin"
    assert made["imagePullSecrets"] == [{"name": "runs"}]
    assert {volume["name"] for volume in made["volumes"]} >= {"sources", "scratch"}
    limits = {"memory": "200Mi", "cpu": "800m", "ephemeral-storage": "2Gi"}
    assert made["containers"][0]["resources"]["limits"] == limits
