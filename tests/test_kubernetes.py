"""kubernetes/: well formed by Kubernetes's own schemas, and in agreement with the image, the
settings and the commands.

No cluster runs here: what a scheduler, a kubelet and a runtime would make of it is not shown.
tests/process/test_docker.py runs the image as it is run here: nobody's account, a read-only root,
no capabilities.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from recall_worker.cli.app import app
from recall_worker.settings import ignored, read
from recall_worker.worker.worker import SETTLE_PATIENCE

ROOT = Path(__file__).parent.parent
OVERLAY = ROOT / "examples" / "kubernetes"
KUSTOMIZATIONS = [ROOT / "kubernetes" / "kustomization.yaml", OVERLAY / "kustomization.yaml"]
FILES = [
    path
    for path in (*sorted((ROOT / "kubernetes").glob("*.yaml")), OVERLAY / "autoscaler.yaml")
    if path not in KUSTOMIZATIONS
]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
GOODBYE = 5.0
"""Seconds: what a worker may take beyond its last settles, to take leave and to send its last
traces."""

Object = dict[str, Any]
OBJECTS: list[Object] = [
    o for file in FILES for o in yaml.safe_load_all(file.read_text(encoding="utf-8"))
]
BY_KIND: dict[str, Object] = {f"{o['kind']}/{o['metadata']['name']}": o for o in OBJECTS}


def pod(owner: Object) -> Object:
    """The pod's spec of whatever makes pods."""
    spec = owner["spec"]["jobTemplate"]["spec"] if owner["kind"] == "CronJob" else owner["spec"]
    return dict(spec["template"]["spec"])


PODS = {
    name: pod(o) for name, o in BY_KIND.items() if o["kind"] in ("Deployment", "Job", "CronJob")
}


def environment(spec: Object) -> dict[str, str]:
    """What the container's environment would be."""
    [container] = spec["containers"]
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= BY_KIND[f"ConfigMap/{source['configMapRef']['name']}"]["data"]
    return found | {variable["name"]: variable["value"] for variable in container["env"]}


def test_what_there_is() -> None:
    """One of each, by name; everything that makes pods is among those that the tests look at."""
    assert sorted(BY_KIND) == [
        "ConfigMap/recall-worker",
        "ConfigMap/recall-worker-mail",
        "CronJob/recall-worker-prune",
        "Deployment/recall-worker",
        "Deployment/recall-worker-console",
        "Deployment/recall-worker-mail",
        "HorizontalPodAutoscaler/recall-worker",
        "Job/recall-worker-migrate",
        "NetworkPolicy/recall-worker",
        "PodDisruptionBudget/recall-worker",
        "PodDisruptionBudget/recall-worker-mail",
    ]
    assert len(PODS) == 5


@pytest.mark.parametrize("release", ["1.27", "1.34", "1.37"])
@pytest.mark.parametrize("name", BY_KIND)
def test_kubernetes_takes_it(name: str, release: str) -> None:
    """By the schemas of old and new releases, strictly: a field that is unknown, or in the wrong
    place, is refused."""
    kubernetes_validate.validate(BY_KIND[name], release, strict=True)


def test_the_schemas_are_strict() -> None:
    """A typing error in a field's name is found."""
    spoilt = json.loads(
        json.dumps(BY_KIND["Deployment/recall-worker"]).replace(
            "readOnlyRootFilesystem", "readonlyRootFilesystem"
        )
    )
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(spoilt, "1.34", strict=True)


@pytest.mark.parametrize("name", PODS)
def test_the_settings_exist(name: str, tmp_path: Path) -> None:
    """Each variable is a setting, with a value that it takes; its secrets are files of a volume
    that is mounted there."""
    spec = PODS[name]
    given = environment(spec)
    assert ignored(given) == []
    [mount] = spec["containers"][0]["volumeMounts"]
    [volume] = spec["volumes"]
    assert (
        mount["name"] == volume["name"]
        and mount["readOnly"]
        and volume["secret"]["defaultMode"] == 0o440
    )
    secrets = {n: Path(value) for n, value in given.items() if n.endswith("_FILE")}
    assert {path.parent.as_posix() for path in secrets.values()} == {mount["mountPath"]}
    for n, path in secrets.items():
        (tmp_path / path.name).write_text(
            "postgresql://recall@db/app" if "DSN" in n else "a-secret-of-16-and-more",
            encoding="utf-8",
        )
    read(given | {n: str(tmp_path / path.name) for n, path in secrets.items()}, needed=["dsn"])
    # And a command makes that secret, with these files in it, beside the object that wants it.
    made = f"kubectl create secret generic {volume['secret']['secretName']} " + "--from-file="
    [line] = [
        line
        for file in FILES
        for line in file.read_text(encoding="utf-8").splitlines()
        if made in line
    ]
    assert set(re.findall(r"--from-file=(\w+)=", line)) >= {path.name for path in secrets.values()}


@pytest.mark.parametrize("name", PODS)
def test_the_command_exists(name: str) -> None:
    """Its arguments are a command with options that it takes."""
    [container] = PODS[name]["containers"]
    assert "command" not in container and 'ENTRYPOINT ["recall-worker"]' in DOCKERFILE
    command, *rest = container["args"]
    found = getattr(get_command(app), "commands")[command]  # noqa: B009 - a Group, which typer's types don't tell
    found.make_context(command, list(rest)).close()


@pytest.mark.parametrize("name", PODS)
def test_it_has_no_more_rights_than_it_needs(name: str) -> None:
    """What Kubernetes calls the restricted standard, a read-only root, the image's own account, no
    token of the cluster's."""
    spec = PODS[name]
    [container] = spec["containers"]
    account = spec["securityContext"]
    assert account["runAsNonRoot"] and account["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (
        f"USER {account['runAsUser']}:{account['runAsGroup']}" in DOCKERFILE
        and account["fsGroup"] == account["runAsGroup"]
    )
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
    assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(spec)
    assert "memory" in container["resources"]["limits"] and set(
        container["resources"]["requests"]
    ) == {"cpu", "memory"}


def test_probes_ask_where_the_worker_answers() -> None:
    """Both probes go to the port that RECALL_OPS_LISTEN opens on every address of the pod, and to
    pages that there are."""
    spec = PODS["Deployment/recall-worker"]
    [container] = spec["containers"]
    [port] = container["ports"]
    address = read(
        environment(spec) | {"RECALL_DSN_FILE": "", "RECALL_RUN_TOKEN_FILE": ""}
    ).ops_address
    assert address == ("0.0.0.0", port["containerPort"])
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("liveness", "readiness")}
    assert probes == {
        "liveness": {"path": "/livez", "port": port["name"]},
        "readiness": {"path": "/readyz", "port": port["name"]},
    }


@pytest.mark.parametrize(
    "name",
    [name for name in PODS if name.startswith("Deployment/") and "console" not in name],
)
def test_the_drain_fits(name: str) -> None:
    """The pod is given longer than the drain, the last settles and the leave together; long enough
    for runs of minutes, and no longer than a cluster waits that drains a node."""
    spec = PODS[name]
    drain = float(environment(spec)["RECALL_DRAIN_TIMEOUT"])
    assert drain >= 300
    assert drain + SETTLE_PATIENCE + GOODBYE < spec["terminationGracePeriodSeconds"] <= 600


def test_no_job_goes_on_for_ever() -> None:
    """Each has a deadline, the nightly one ends long before the next night, and the command that
    waits for the schema waits as long as its Job may take."""
    migrate, prune = BY_KIND["Job/recall-worker-migrate"], BY_KIND["CronJob/recall-worker-prune"]
    assert 3600 <= migrate["spec"]["activeDeadlineSeconds"] <= 86400
    assert prune["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] <= 6 * 3600
    assert prune["spec"]["startingDeadlineSeconds"] >= 200  # Less, and it may be missed for good.
    assert prune["spec"]["concurrencyPolicy"] == "Forbid"


def test_who_may_connect() -> None:
    """The policy holds for every pod of ours, also those of another queue, and admits one sender,
    to the port of the pages."""
    spec = BY_KIND["NetworkPolicy/recall-worker"]["spec"]
    assert set(selected(spec["podSelector"]["matchLabels"])) == set(PODS)
    assert spec["policyTypes"] == ["Ingress"]
    [rule] = spec["ingress"]
    [sender] = rule["from"]
    assert set(sender) == {"namespaceSelector", "podSelector"}
    [port] = PODS["Deployment/recall-worker"]["containers"][0]["ports"]
    assert rule["ports"] == [{"port": port["name"], "protocol": "TCP"}]


def test_the_autoscaler_counts_what_is_exported() -> None:
    """Its target is there, its metric is one of ours, and the workers that it allows are counted in
    connections as docs/deployment.md does."""
    spec = BY_KIND["HorizontalPodAutoscaler/recall-worker"]["spec"]
    target = spec["scaleTargetRef"]
    assert f"{target['kind']}/{target['name']}" in BY_KIND
    [metric] = spec["metrics"]
    monitoring = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert f"`{metric['external']['metric']['name']}`" in monitoring
    assert 2 <= spec["minReplicas"] < spec["maxReplicas"]


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: path.parent.name)
def test_a_kustomization_names_what_there_is(path: Path) -> None:
    """Each resource is there, each patch has its target, and each image is one that is used."""
    kustomization = yaml.safe_load(path.read_text(encoding="utf-8"))
    for resource in kustomization["resources"]:
        found = (path.parent / resource).resolve()
        assert found.is_file() or (found / "kustomization.yaml").is_file(), resource
    for patch in kustomization.get("patches", ()):
        target = BY_KIND[f"{patch['target']['kind']}/{patch['target']['name']}"]
        change = yaml.safe_load(patch["patch"])
        if isinstance(change, dict):
            assert change["kind"] == target["kind"]
            assert change["metadata"]["name"] == target["metadata"]["name"]
            continue
        for operation in change:
            place: Any = target
            for name in operation["path"].split("/")[1:]:
                place = place[name]
    images = {image["name"] for image in kustomization.get("images", ())}
    for image in kustomization.get("images", ()):
        assert image["newTag"] == version("recall-worker")
    assert images <= {spec["containers"][0]["image"].partition(":")[0] for spec in PODS.values()}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_what_kustomize_makes() -> None:
    """The overlay gives everything, in its namespace, with its image and settings, and Kubernetes
    takes it; the number of workers is the autoscaler's alone."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(OVERLAY)], capture_output=True, text=True, check=False
    )
    if "unknown command" in done.stderr or "unknown field" in done.stderr:
        pytest.skip("this kubectl's kustomize is too old")
    assert done.returncode == 0, done.stderr
    made = {f"{o['kind']}/{o['metadata']['name']}": o for o in yaml.safe_load_all(done.stdout)}
    apart = ("mail", "console")
    assert set(made) == {name for name in BY_KIND if not any(word in name for word in apart)}
    for o in made.values():
        kubernetes_validate.validate(o, "1.34", strict=True)
        assert o["metadata"]["namespace"] == "agents"
    assert "replicas" not in made["Deployment/recall-worker"]["spec"]
    for name in PODS.keys() & made.keys():
        [container] = pod(made[name])["containers"]
        assert container["image"].startswith("registry.example/team/recall-worker:")
    settings = made["ConfigMap/recall-worker"]["data"]
    assert settings["RECALL_FLEET_CONCURRENCY"] == "20"
    assert ignored(settings) == []
    read(settings)


def selected(by: dict[str, str]) -> Iterator[str]:
    for name, o in BY_KIND.items():
        template = (
            o["spec"]["jobTemplate"]["spec"]["template"]
            if o["kind"] == "CronJob"
            else o.get("spec", {}).get("template")
        )
        if template is not None and by.items() <= template["metadata"]["labels"].items():
            yield name


def test_selectors_mean_the_workers_alone() -> None:
    """Deployment, budget and spread select the workers' pods, and no pod of a job; the budget lets
    a drained node go on."""
    deployment, budget = (
        BY_KIND["Deployment/recall-worker"],
        BY_KIND["PodDisruptionBudget/recall-worker"],
    )
    [spread] = PODS["Deployment/recall-worker"]["topologySpreadConstraints"]
    for selector in (
        deployment["spec"]["selector"],
        budget["spec"]["selector"],
        spread["labelSelector"],
    ):
        assert list(selected(selector["matchLabels"])) == ["Deployment/recall-worker"]
    assert 0 < budget["spec"]["maxUnavailable"] < deployment["spec"]["replicas"]


def test_one_image() -> None:
    """The same everywhere, of this version."""
    assert {spec["containers"][0]["image"] for spec in PODS.values()} == {
        f"recall-worker:{version('recall-worker')}"
    }


@pytest.mark.parametrize(
    "path",
    [
        ROOT / "kubernetes" / "console.yaml",
        ROOT / "kubernetes" / "migrate.yaml",
        ROOT / "kubernetes" / "queue.yaml",
        ROOT / "kubernetes" / "recall-worker.yaml",
        OVERLAY / "kustomization.yaml",
        OVERLAY / "README.md",
        ROOT / "docs" / "deployment.md",
    ],
    ids=lambda path: path.name,
)
def test_the_commands_name_what_there_is(path: Path) -> None:
    """Files, jobs and deployments in the commands for kubectl are there, by these names."""
    commands = re.findall(r"kubectl .*", path.read_text(encoding="utf-8"))
    assert commands
    for command in commands:
        assert [
            file for file in re.findall(r" -[fk] (\S+)", command) if not (ROOT / file).exists()
        ] == []
        named = [
            f"{kind.capitalize()}/{name}"
            for kind, name in re.findall(r"\b(job|deployment)[/ ]([a-z-]+)", command)
        ]
        assert set(named) <= set(BY_KIND), command
