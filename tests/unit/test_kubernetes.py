"""What jobs are made of, and what is read out of a cluster: without one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from flowagent.errors import FlowagentError, SandboxError, SettingsError
from flowagent.kubernetes.manifest import manifest
from flowagent.run_configs import KubernetesRun
from flowagent.runners.kubernetes import allowed, jobs, symptoms, templates
from flowagent.settings import Settings

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


def settings(**more: Any) -> Settings:
    return Settings(home=Path("/nowhere"), store="sqlite://", **more)


def made(*given: dict[str, Any], config: KubernetesRun | None = None, **more: Any) -> dict[str, Any]:
    """The job of the agent's template, then the flow's."""
    own = settings(**more)
    asked = (config or KubernetesRun()).to_json()
    image = jobs.image_of(own, given, asked, None)
    return jobs.job(
        own,
        next(iter(given), {}),
        given[1:],
        asked,
        name="flowagent-00ff.1",
        image=image,
        command=("flowagent", "execute", "--spec"),
        owner="me",
        run_id="00ff",
        attempt=1,
        flow_name="A flow with a name that no label can have",
        grace=own.grace,
        lasts=20,
    )


def flow_container(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["template"]["spec"]["containers"][0]
    assert found["name"] == "flow"
    return found


VERSIONS = ("1.25", "1.30")
FULL = KubernetesRun(
    job_template=SSH_KEYS,
    image="registry.example.com/flows@sha256:" + "0" * 64,
    env={"A": "b"},
    cpu_limit=2,
    cpu_request="100m",
    memory_limit="1Gi",
    memory_request="64Mi",
    service_account_name="reader",
    image_pull_secrets=["login"],
    image_pull_policy="Always",
)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_goes_to_a_cluster_is_valid(version: str) -> None:
    template = templates.parse(SSH_KEYS, "here")
    for job in (made(image="a/b:1"), made(template, config=FULL, image_pull_secrets=("a",), keep="failed")):
        kubernetes_validate.validate(job, version, strict=True)
        held = {"metadata": {**job["metadata"], "uid": "u"}}
        kubernetes_validate.validate(jobs.secret("flowagent-00ff.1", {}, held), version, strict=True)
    for each in manifest(
        name="agent", namespace="flows", image="a:1", labels=["x"], job_image="b:1", storage="1Gi"
    ):
        kubernetes_validate.validate(each, version, strict=True)


def test_arguments_go_before_templates() -> None:
    template = templates.parse(SSH_KEYS, "here")
    job = made(template, config=FULL)
    pod, flow = job["spec"]["template"]["spec"], flow_container(job)
    assert flow["image"].startswith("registry.example.com/flows@")
    assert flow["resources"] == {
        "limits": {"cpu": "2", "memory": "1Gi"},
        "requests": {"cpu": "100m", "memory": "64Mi"},
    }
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("reader", True)
    assert pod["imagePullSecrets"] == [{"name": "login"}]
    assert {volume["name"] for volume in pod["volumes"]} == {"ssh-key", jobs.VOLUME}
    assert pod["volumes"][0]["secret"] == {
        "secretName": "my-ssh-key",
        "optional": False,
        "defaultMode": 0o600,
    }
    assert [mount["mountPath"] for mount in flow["volumeMounts"]] == ["/root/.ssh", jobs.PLACE]
    assert flow["command"] == ["flowagent", "execute", "--spec", f"{jobs.PLACE}/{jobs.BRIEF}"]


def test_a_flow_s_template_goes_over_the_agent_s() -> None:
    own = {
        "metadata": {"labels": {"team": "data"}},
        "spec": {
            "ttlSecondsAfterFinished": 5,
            "template": {
                "spec": {
                    "nodeSelector": {"disk": "ssd"},
                    "containers": [{"name": "flow", "image": "own:1", "env": [{"name": "A", "value": "1"}]}],
                }
            },
        },
    }
    env = [{"name": "A", "value": "2"}, {"name": "B", "value": "3"}]
    container = {"name": "flow", "env": env}
    asked = {"spec": {"template": {"spec": {"containers": [{"name": "sidecar", "image": "s:1"}, container]}}}}
    job = made(own, asked)
    pod = job["spec"]["template"]["spec"]
    assert [each["name"] for each in pod["containers"]] == ["flow", "sidecar"]
    assert flow_container(job)["env"] == env
    assert flow_container(job)["image"] == "own:1"
    assert pod["nodeSelector"] == {"disk": "ssd"}
    assert job["spec"]["ttlSecondsAfterFinished"] == 5
    assert job["metadata"]["labels"]["team"] == "data"
    assert own["metadata"] == {"labels": {"team": "data"}}  # what was given stays as it was


def test_pull_secrets_are_not_added_to_others() -> None:
    def of(*given: dict[str, Any], **config: Any) -> Any:
        found = made(*given, config=KubernetesRun(**config), image="a:1", image_pull_secrets=("option",))
        return [each["name"] for each in found["spec"]["template"]["spec"]["imagePullSecrets"]]

    own, asked = (_pod(imagePullSecrets=[{"name": name}]) for name in ("own", "asked"))
    assert of() == ["option"]
    assert of(own) == ["own"]
    assert of(own, asked) == ["asked"]
    assert of(own, asked, image_pull_secrets=["a", "b"]) == ["a", "b"]


def test_a_variable_has_one_source() -> None:
    secret = {"secretKeyRef": {"name": "of-the-agent", "key": "a"}}
    own = _of_flow(env=[{"name": "A", "valueFrom": secret}, {"name": "B", "valueFrom": secret}])
    part = {"name": "B", "valueFrom": {"secretKeyRef": {"key": "another"}}}
    job = made(own, _of_flow(env=[{"name": "A", "value": "1"}, part]), image="a:1")
    assert flow_container(job)["env"] == [{"name": "A", "value": "1"}, part]


def test_what_no_template_changes() -> None:
    hostile = {
        "metadata": {"name": "mine", "namespace": "kube-system", "labels": {jobs.OWNER: "another"}},
        "spec": {
            "backoffLimit": 6,
            "parallelism": 50,
            "activeDeadlineSeconds": 10_000,
            "template": {
                "metadata": {"labels": {jobs.JOB: "another"}},
                "spec": {
                    "restartPolicy": "Always",
                    "containers": [{"name": "flow", "command": ["sh"], "args": ["-c", "true"]}],
                    "volumes": [{"name": jobs.VOLUME, "secret": {"secretName": "of-somebody-else"}}],
                },
            },
        },
    }
    job = made(hostile, image="a:1")
    spec = job["spec"]
    assert (job["metadata"]["name"], "namespace" in job["metadata"]) == ("flowagent-00ff.1", False)
    assert job["metadata"]["labels"][jobs.OWNER] == "me"
    assert (spec["backoffLimit"], spec["parallelism"], spec["completions"]) == (0, 1, 1)
    assert spec["activeDeadlineSeconds"] == 20
    assert spec["template"]["metadata"]["labels"][jobs.JOB] == "flowagent-00ff.1"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["volumes"][0]["secret"]["secretName"] == "flowagent-00ff.1"
    assert flow_container(job)["command"][0] == "flowagent" and flow_container(job)["args"] == []
    assert made({"spec": {"activeDeadlineSeconds": 7}}, image="a:1")["spec"]["activeDeadlineSeconds"] == 7


HARDENED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def test_by_default_a_pod_may_do_nothing() -> None:
    job = made(image="a:1")
    pod = job["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert flow_container(job)["securityContext"] == HARDENED
    assert pod["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["terminationGracePeriodSeconds"] == 15
    assert job["spec"]["suspend"] is False


def test_an_image_has_to_be_named() -> None:
    with pytest.raises(SettingsError, match="no image is named for the pod"):
        made()


def _pod(**fields: Any) -> dict[str, Any]:
    return {"spec": {"template": {"spec": fields}}}


def _of_flow(**fields: Any) -> dict[str, Any]:
    return _pod(containers=[{"name": "flow", **fields}])


def _with_volume(**kind: Any) -> dict[str, Any]:
    return _pod(volumes=[{"name": "v", **kind}])


def _toleration(**fields: Any) -> dict[str, Any]:
    return _pod(tolerations=[fields])


WHERE = "the flow's job template"
UNCONFINED = {"seccompProfile": {"type": "Unconfined"}}
TOKEN = {"sources": [{"serviceAccountToken": {"path": "token"}}]}
CLONE = {"spec": {"dataSource": {"kind": "PersistentVolumeClaim", "name": "agent"}}}
PROBE = {"httpGet": {"host": "169.254.169.254", "port": 80}}
APPARMOR = {"container.apparmor.security.beta.kubernetes.io/flow": "unconfined"}


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (_pod(hostNetwork=True), "hostNetwork"),
        (_pod(hostPID=True), "hostPID"),
        (_pod(hostIPC=True), "hostIPC"),
        (_pod(hostUsers=True), "hostUsers"),
        (_pod(nodeName="n"), "nodeName"),
        (_pod(runtimeClassName="runc"), "runtimeClassName"),
        (_pod(serviceAccount="other"), "serviceAccount"),  # the old name of serviceAccountName
        (_pod(automountServiceAccountToken=True), "automountServiceAccountToken: True"),
        (_pod(priorityClassName="system-node-critical"), "priorityClassName: system-node-critical"),
        (_with_volume(hostPath={"path": "/"}), r"volumes\[v\].hostPath"),
        (_with_volume(gitRepo={"repository": "r"}), "gitRepo"),
        (_with_volume(nfs={"server": "s", "path": "/"}), "nfs"),
        (_with_volume(csi={"driver": "d"}), "csi"),
        (_with_volume(projected=TOKEN), "serviceAccountToken"),
        (_with_volume(ephemeral={"volumeClaimTemplate": CLONE}), "dataSource"),
        (_toleration(operator="Exists"), "no key, which is all taints"),
        (_toleration(operator="Exists", key=""), "no key, which is all taints"),
        (_toleration(operator="Exists", key="node-role.kubernetes.io/master"), "node-role.*master"),
        (_pod(securityContext={"sysctls": [{"name": "a", "value": "b"}]}), "sysctls"),
        (_pod(securityContext=UNCONFINED), "seccompProfile: a profile other than RuntimeDefault"),
        (_pod(securityContext={"windowsOptions": {"hostProcess": True}}), "windowsOptions"),
        (_of_flow(securityContext=UNCONFINED), "seccompProfile: a profile other than RuntimeDefault"),
        (_of_flow(securityContext={"seLinuxOptions": {"type": "spc_t"}}), "seLinuxOptions"),
        (_of_flow(securityContext={"windowsOptions": {"hostProcess": True}}), "windowsOptions"),
        (_of_flow(securityContext={"procMount": "Unmasked"}), "procMount"),
        (_of_flow(securityContext={"privileged": True}), "privileged"),
        (_of_flow(securityContext={"allowPrivilegeEscalation": True}), "allowPrivilegeEscalation"),
        (_of_flow(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}), "capabilities"),
        (_of_flow(ports=[{"containerPort": 80, "hostPort": 80}]), "hostPort"),
        (_of_flow(lifecycle={"preStop": {"exec": {"command": ["sleep", "9"]}}}), "lifecycle"),
        (_of_flow(livenessProbe=PROBE), "livenessProbe.httpGet.host"),
        (_of_flow(restartPolicy="Always"), "restartPolicy"),
        (_of_flow(tty=True), "tty"),
        (_of_flow(volumeMounts=[{"name": "v", "mountPath": "/v", "mountPropagation": "None"}]), "mountProp"),
        (_of_flow(volumeMounts=[{"name": "v", "mountPath": "/v"}]), "a mount of volume v"),
        (_pod(initContainers=[{"name": "i", "securityContext": {"privileged": True}}]), "privileged"),
        ({"metadata": {"finalizers": ["a/b"]}}, "metadata.finalizers"),
        ({"metadata": {"ownerReferences": []}}, "metadata.ownerReferences"),
        ({"metadata": {"labels": {"flowagent.owner": "another"}}}, "labels: flowagent.owner"),
        ({"spec": {"template": {"metadata": {"annotations": APPARMOR}}}}, "annotations: container.apparmor"),
        ({"spec": {"podFailurePolicy": {"rules": []}}}, "spec.podFailurePolicy"),
        ({"spec": {"manualSelector": True}}, "spec.manualSelector"),
        ({"newField": True}, "newField"),
    ],
)  # fmt: skip
def test_what_flows_may_not_say(template: dict[str, Any], what: str) -> None:
    checked = templates.checked(template, WHERE)
    with pytest.raises(SandboxError, match=f"asks for .*{what}.*--job-template"):
        allowed.check(checked, WHERE)


HARMLESS = """
apiVersion: batch/v1
kind: Job
metadata: {name: mine, creationTimestamp: null, labels: {team: data, app.kubernetes.io/part-of: reports}}
spec:
  backoffLimit: 3
  suspend: true
  template:
    metadata: {creationTimestamp: null, annotations: {prometheus.io/scrape: "true"}}
    spec:
      automountServiceAccountToken: false
      hostNetwork: false
      nodeSelector: {disk: ssd}
      priorityClassName: batch
      restartPolicy: OnFailure
      securityContext: {runAsUser: 5, fsGroup: 6, supplementalGroups: [7], runAsNonRoot: true}
      serviceAccountName: reader
      terminationGracePeriodSeconds: 3600
      tolerations: [{key: gpu, operator: Exists}]
      initContainers:
        - {name: proxy, image: "p:1", restartPolicy: Always, startupProbe: {tcpSocket: {port: 80}}}
      containers:
        - name: flow
          env: [{name: A, valueFrom: {secretKeyRef: {name: s, key: a}}}]
          envFrom: [{secretRef: {name: s}}]
          resources: {limits: {nvidia.com/gpu: 1}}
          securityContext: {readOnlyRootFilesystem: true, capabilities: {drop: [KILL]}}
          volumeMounts: [{name: scratch, mountPath: /scratch}]
      volumes:
        - {name: scratch, emptyDir: {medium: Memory}}
        - {name: a, configMap: {name: c}}
        - {name: b, persistentVolumeClaim: {claimName: data}}
        - {name: c, projected: {sources: [{secret: {name: s}}, {configMap: {name: c}}]}}
        - {name: d, downwardAPI: {items: []}}
        - {name: e, ephemeral: {volumeClaimTemplate: {spec: {accessModes: [ReadWriteOnce]}}}}
"""


def test_what_flows_may_say() -> None:
    for text in (SSH_KEYS, HARMLESS):
        allowed.check(templates.parse(text, WHERE), WHERE, reserved=["agent"])
    job = made({}, templates.parse(HARMLESS, WHERE), image="a:1")
    kubernetes_validate.validate(job, VERSIONS[-1], strict=True)
    pod, flow = job["spec"]["template"]["spec"], flow_container(job)
    assert (job["spec"]["suspend"], job["spec"]["backoffLimit"], pod["restartPolicy"]) == (False, 0, "Never")
    assert pod["terminationGracePeriodSeconds"] == 15
    assert (
        made(_pod(terminationGracePeriodSeconds=1), image="a:1", grace=30.5)["spec"]["template"]["spec"][
            "terminationGracePeriodSeconds"
        ]
        == 31 + jobs.KILL_MARGIN
    )
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsUser"] == 5
    assert flow["securityContext"] == {**HARDENED, "readOnlyRootFilesystem": True}


LOOSENED = {
    "securityContext": {
        "privileged": True,
        "allowPrivilegeEscalation": True,
        "capabilities": {"add": ["SYS_ADMIN"]},
        "seccompProfile": {"type": "Unconfined"},
    }
}


@pytest.mark.parametrize(
    "container", [{"securityContext": None}, {"securityContext": {"capabilities": None}}, LOOSENED]
)
def test_no_flow_s_template_loosens_its_containers(container: dict[str, Any]) -> None:
    """Whatever of it may have been let through."""
    asked = _pod(
        automountServiceAccountToken=True,
        securityContext=None,
        containers=[{"name": "sidecar", "image": "s:1", **container}, {"name": "flow", **container}],
        initContainers=[{"name": "first", "image": "s:1"}],
    )
    job = made({}, asked, image="a:1")
    pod = job["spec"]["template"]["spec"]
    for each in (*pod["containers"], *pod["initContainers"]):
        assert {key: each["securityContext"][key] for key in HARDENED} == HARDENED
    assert pod["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["automountServiceAccountToken"] is False


def test_what_the_agent_s_template_confines_stays() -> None:
    rights = {"readOnlyRootFilesystem": True, "capabilities": {"add": ["KILL"]}}
    own = _pod(
        automountServiceAccountToken=False,
        nodeSelector={"pool": "flows"},
        affinity={"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {}}},
        priorityClassName="low",
        securityContext={"runAsNonRoot": True, "runAsUser": 1000},
        containers=[
            {"name": "flow", "securityContext": rights},
            {"name": "proxy", "image": "p:1", "securityContext": {"capabilities": {"add": ["NET_ADMIN"]}}},
        ],
    )  # fmt: skip
    own["spec"]["template"]["metadata"] = {"labels": {"network": "closed"}}
    root = {"runAsUser": 0, "runAsNonRoot": False, "readOnlyRootFilesystem": False}
    asked = _pod(
        nodeSelector={"pool": "control", "disk": "ssd"},
        affinity={"nodeAffinity": {}},
        priorityClassName="high",
        securityContext={"runAsUser": 0, "fsGroup": 5},
        containers=[
            {"name": "flow", "securityContext": root},
            {"name": "mine", "image": "m:1", "securityContext": {"runAsUser": 0}},
        ],
    )  # fmt: skip
    asked["spec"]["template"]["metadata"] = {"labels": {"network": "open", "mine": "yes"}}
    allowed.check(templates.checked(asked, WHERE), WHERE, own=own)
    job = made(own, asked, config=KubernetesRun(service_account_name="reader"), image="a:1")
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "flows", "disk": "ssd"}
    assert pod["affinity"] == own["spec"]["template"]["spec"]["affinity"]
    assert (pod["priorityClassName"], pod["automountServiceAccountToken"]) == ("low", False)
    assert pod["securityContext"]["runAsUser"] == 1000 and pod["securityContext"]["fsGroup"] == 5
    found = {each["name"]: each["securityContext"] for each in pod["containers"]}
    for name in ("flow", "mine"):
        assert (found[name]["runAsUser"], found[name]["runAsNonRoot"]) == (1000, True)
        assert found[name]["readOnlyRootFilesystem"] is True
        assert found[name]["capabilities"] == {"drop": ["ALL"], "add": ["KILL"]}
    assert found["proxy"] == {"capabilities": {"add": ["NET_ADMIN"]}}
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert (labels["network"], labels["mine"]) == ("closed", "yes")


def test_the_agent_s_template_may_loosen() -> None:
    loose = {"name": "flow", "securityContext": {"privileged": True, "allowPrivilegeEscalation": True}}
    own = _pod(automountServiceAccountToken=True, securityContext=UNCONFINED, containers=[loose])
    job = made(own, image="a:1")
    assert job["spec"]["template"]["spec"]["automountServiceAccountToken"] is True
    rights = flow_container(job)["securityContext"]
    assert (rights["privileged"], rights["seccompProfile"]) == (True, {"type": "Unconfined"})
    without = made(_of_flow(securityContext=None), image="a:1")
    assert flow_container(without)["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (_pod(containers=[{"name": "proxy", "command": ["sh"]}]), "container proxy of the agent"),
        (_pod(initContainers=[{"name": "proxy", "image": "s:1"}]), "container proxy of the agent"),
        (_pod(volumes=[{"name": "host", "emptyDir": {}}]), "volume host of the agent"),
        (_pod(volumes=[{"name": jobs.VOLUME, "emptyDir": {}}]), f"volume {jobs.VOLUME} of the agent"),
        (_of_flow(volumeMounts=[{"name": "host", "mountPath": "/h"}]), "a mount of volume host"),
    ],
)
def test_what_the_agent_s_template_brings_stays_as_it_is(asked: dict[str, Any], what: str) -> None:
    own = _pod(containers=[{"name": "proxy"}], volumes=[{"name": "host", "hostPath": {"path": "/"}}])
    with pytest.raises(SandboxError, match=what):
        allowed.check(templates.checked(asked, WHERE), WHERE, own=own)


def _env(**source: Any) -> dict[str, Any]:
    return _of_flow(env=[{"name": "A", "valueFrom": source}])


OTHERS = "flowagent-0123abcd.1"


@pytest.mark.parametrize(
    "template",
    [
        _pod(serviceAccountName="agent"),
        _pod(imagePullSecrets=[{"name": "agent"}]),
        _with_volume(secret={"secretName": "agent"}),
        _with_volume(secret={"secretName": "agent-token-x8k2p"}),
        _with_volume(secret={"secretName": OTHERS}),
        _with_volume(projected={"sources": [{"secret": {"name": "agent"}}]}),
        _with_volume(persistentVolumeClaim={"claimName": "agent"}),
        _env(secretKeyRef={"name": "agent", "key": "store"}),
        _of_flow(envFrom=[{"secretRef": {"name": "agent"}}]),
        _pod(initContainers=[{"name": "i", "image": "i:1", "envFrom": [{"secretRef": {"name": "agent"}}]}]),
    ],
)
def test_the_agent_s_own_is_not_for_flows(template: dict[str, Any]) -> None:
    checked = templates.checked(template, WHERE)
    with pytest.raises(SandboxError, match=r"which is an agent's own; use another.*--job-namespace NAME"):
        allowed.check(checked, WHERE, reserved=["agent"])
    if OTHERS not in str(template):
        allowed.check(checked, WHERE, reserved=["another"])


def test_the_agent_s_own_is_not_for_run_configs() -> None:
    for config in (KubernetesRun(service_account_name="agent"), KubernetesRun(image_pull_secrets=["agent"])):
        with pytest.raises(
            SandboxError, match="the flow's run config asks for agent, which is an agent's own"
        ):
            allowed.check_config(config.to_json(), ["agent"])
        allowed.check_config(config.to_json(), [])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"spec": None}, "spec takes a table"),
        ({"spec": {"template": None}}, "template takes a table"),
        (_pod(containers=None), "containers takes a list of tables"),
        (_pod(containers={}), "containers takes a list of tables"),
        (_pod(containers=[None]), "containers takes a list of tables"),
        (_pod(containers=[{"image": "a:1"}]), "containers takes tables that all have a name"),
        (_pod(containers=[{"name": 3}]), "containers takes tables that all have a name"),
        (_pod(volumes=[{"emptyDir": {}}]), "volumes takes tables that all have a name"),
        (_of_flow(volumeMounts=[{"name": "v"}]), "volumeMounts takes tables that all have a mountPath"),
        (_of_flow(env=[{"value": "x"}]), "env takes tables that all have a name"),
        (_of_flow(securityContext=[]), "securityContext takes a table"),
        (_of_flow(securityContext=None), r"containers\[flow\].securityContext is null"),
        (_of_flow(securityContext={"capabilities": None}), "capabilities is null"),
        (_pod(automountServiceAccountToken=None), "automountServiceAccountToken is null"),
        (_pod(tolerations=[3]), "tolerations takes a list of tables"),
        (_of_flow(envFrom={}), "envFrom takes a list of tables"),
        (_of_flow(envFrom=[3]), r"envFrom\[0\] takes a table"),
        (_of_flow(livenessProbe=[]), "livenessProbe takes a table"),
        (_with_volume(secret="agent"), "secret takes a table"),
        (_with_volume(secret={"secretName": ["agent"]}), "secretName, takes a name"),
    ],
)
def test_templates_of_flows_that_are_malformed(template: dict[str, Any], message: str) -> None:
    with pytest.raises(templates.TemplateError, match=f"^{WHERE}.*{message}") as refused:
        allowed.check(templates.checked(template, WHERE), WHERE, reserved=["agent"])
    assert "\n" not in str(refused.value)


LAUGHS = "\n".join(["a0: &a0 {x: y}", *(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 30))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "here, line 1: this is not YAML; correct it"),
        ("secret: 'hunter2\n", "here, line 2: this is not YAML; correct it"),
        ("- a", "here: a job template is a table"),
        ("kind: Pod", "here: it is a Pod of batch/v1; give a Job of batch/v1"),
        ("spec: 3", "here: spec takes a table"),
        ("spec: {template: {spec: {containers: [3]}}}", "here: containers takes a list of tables"),
        ("1: 2", "here: 1 is no name of a field"),
        (LAUGHS, "here: it is nested too deeply, or too long"),
        ("!!python/object/apply:os.system ['true']", "here, line 1: this is not YAML; correct it"),
        ("#" * (1 << 20) + "#", "here: a job template has at most"),
    ],
)  # fmt: skip
def test_templates_that_will_not_do(text: str, message: str) -> None:
    with pytest.raises(FlowagentError) as refused:
        templates.parse(text, "here")
    assert str(refused.value).startswith(message), refused.value
    assert "hunter2" not in str(refused.value)


def test_a_brief_goes_with_its_job() -> None:
    job = made(image="a:1")
    job["metadata"]["uid"] = "the-uid"
    secret = jobs.secret("flowagent-00ff.1", {"spec": {"a": "b"}}, job)
    assert secret["metadata"]["ownerReferences"][0]["uid"] == "the-uid"
    assert json.loads(base64.b64decode(secret["data"][jobs.BRIEF])) == {"spec": {"a": "b"}}
    with pytest.raises(FlowagentError, match="a pod can be told 1000000"):
        jobs.secret("flowagent-00ff.1", {"spec": "x" * 1_000_001}, job)


# -- symptoms --------------------------------------------------------------------------------------


def pod(state: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    statuses = [{"name": "flow", "image": "a:1", "state": state}] if state else []
    return {
        "metadata": {"name": "p", "uid": "u"},
        "spec": {"nodeName": "n1", "containers": [{"name": "flow"}]},
        "status": {"phase": "Pending", "containerStatuses": statuses, **status},
    }


def waiting(reason: str, message: str = "because") -> dict[str, Any]:
    return pod({"waiting": {"reason": reason, "message": message}})


UNSCHEDULABLE = [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}]
UNPULLED = {
    "reason": "Failed",
    "message": 'Failed to pull image "a:1": unauthorized: authentication required',
    "lastTimestamp": "2026-01-01T00:00:09Z",
}
PULLED_BEFORE = {
    "reason": "Failed",
    "message": 'Failed to pull image "a:1": connection refused',
    "lastTimestamp": "2026-01-01T00:00:01Z",
}
NAMED = "registry.example.com/flows@sha256:" + "0" * 64
LONG = (
    f'rpc error: code = NotFound desc = failed to pull and unpack image "{NAMED}": '
    f'failed to resolve reference "{NAMED}": {NAMED}: not found'
)
"""As containerd has it."""
MOUNT = {"reason": "FailedMount", "message": 'secret "my-ssh-key" not found', "lastTimestamp": "2026"}


@pytest.mark.parametrize(
    ("found", "events", "reason", "passes"),
    [
        (waiting("ImagePullBackOff"), [], "image a:1 cannot be pulled: because", False),
        (waiting("ErrImagePull", LONG), [], "cannot be pulled: there is no such image (rpc error", False),
        (
            waiting("ImagePullBackOff", 'Back-off pulling image "a:1"'),
            [UNPULLED, {**UNPULLED, "message": "Error: ImagePullBackOff"}, PULLED_BEFORE],
            "image a:1 cannot be pulled: the registry refuses (unauthorized: authentication required); check "
            "the name, and the Secret with its login: image_pull_secrets=",
            False,
        ),
        (waiting("InvalidImageName", ""), [], "image a:1 is no name of an image", False),
        (waiting("CreateContainerConfigError"), [], "its container cannot be configured: because", False),
        (pod(conditions=UNSCHEDULABLE), [], "no node takes its pod: 0/1 nodes are available", True),
        (
            waiting("ContainerCreating"),
            [MOUNT],
            'its pod does not come up: secret "my-ssh-key" not found',
            True,
        ),
        (
            None,
            [{"reason": "FailedCreate", "message": "exceeded quota"}],
            "does not come up: exceeded quota",
            True,
        ),
        (
            pod(initContainerStatuses=[{"name": "i", "state": {"terminated": {"exitCode": 3}}}]),
            [],
            "its container i ended with exit code 3",
            False,
        ),
    ],
)
def test_obstacles(found: Any, events: list[dict[str, Any]], reason: str, passes: bool) -> None:
    obstacle = symptoms.obstacle(found, events)
    assert obstacle is not None and reason in obstacle.reason and obstacle.passes is passes


@pytest.mark.parametrize(
    ("found", "retryable"),
    [
        (waiting("ErrImagePull", "connection refused"), True),
        (waiting("ErrImagePull", "unauthorized"), False),
        (waiting("ErrImagePull", LONG), False),
        (waiting("CreateContainerError"), True),
        (waiting("CreateContainerConfigError"), False),
    ],
)
def test_whether_another_try_can_help(found: Any, retryable: bool) -> None:
    obstacle = symptoms.obstacle(found, [])
    assert obstacle is not None and obstacle.retryable is retryable


def test_no_obstacle() -> None:
    assert symptoms.obstacle(waiting("ContainerCreating"), [{"reason": "Scheduled"}]) is None
    assert symptoms.obstacle(None, []) is None


def ended(code: int, reason: str = "Error", message: str = "") -> dict[str, Any]:
    return pod({"terminated": {"exitCode": code, "reason": reason, "message": message}}, phase="Failed")


JOB: dict[str, Any] = {"status": {"startTime": "2026-01-01T00:00:00Z"}}
EXCEEDED = {"type": "Failed", "reason": "DeadlineExceeded", "lastTransitionTime": "2026-01-01T00:00:09Z"}


@pytest.mark.parametrize(
    ("found", "job", "noted"),
    [
        (ended(137, "OOMKilled"), JOB, {"ended": True, "out_of_memory": True}),
        (
            ended(127, "ContainerCannotRun", "no such file"),
            JOB,
            {"gone": "its image has no flowagent: no such file; use one that has it", "retryable": False},
        ),
        (ended(1), JOB, {"gone": "the pod ended with exit code 1 before the flow had: last words"}),
        (
            pod(phase="Failed", reason="Evicted", message="The node was low on memory."),
            JOB,
            {"gone": "Evicted from node n1: The node was low on memory."},
        ),
        (pod({"running": {}}, phase="Running"), JOB, {"gone": "node n1 is lost, with its pod on it"}),
        (None, JOB, {"gone": "its pod was deleted, or its node is lost"}),
        (None, None, {"gone": "its job was deleted by somebody else"}),
        (
            None,
            {"status": {"conditions": [EXCEEDED]}},
            {"ended": True, "stop": "lease", "reason": "no agent renewed the deadline of its job"},
        ),
    ],
)
def test_ends(found: Any, job: Any, noted: dict[str, Any]) -> None:
    assert symptoms.end(found, job, "last words") == noted


def test_the_age_of_a_job() -> None:
    assert symptoms.age({"status": {**JOB["status"], "conditions": [EXCEEDED]}}) == 9
    assert symptoms.age(JOB) == symptoms.age(None) == 0


def test_a_node_that_is_away() -> None:
    there = pod({"running": {}}, phase="Running")
    assert not symptoms.lost(there, 0)
    there["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    end = symptoms.timestamp("2026-01-01T00:00:00Z")
    assert not symptoms.lost(there, end)
    assert symptoms.lost(there, end + 30)
    there["status"]["containerStatuses"][0]["ready"] = True
    there["status"]["conditions"] = [
        {"type": "Ready", "status": "False"},
        {"type": "ContainersReady", "status": "True"},
    ]
    assert symptoms.lost(there, end - 10)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64Mi", 64 << 20),
        ("1Gi", 1 << 30),
        ("500M", 500_000_000),
        ("1000", 1000),
        ("odd", None),
        (None, None),
    ],
)
def test_memory_limits(text: str | None, size: int | None) -> None:
    found = pod()
    found["spec"]["containers"][0]["resources"] = {"limits": {"memory": text}}
    assert symptoms.memory_limit(found) == size
