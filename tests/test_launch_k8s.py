"""The Kubernetes manifests: rendered by kustomize, checked against schemas, and as tight as they say."""

import json
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from titan.config.load import load_config
from titan.plan.layout import role_layouts

ROOT = Path(__file__).parents[1]
K8S = ROOT / "launch/k8s"
OVERLAYS = ("base", "overlays/cpu-test", "overlays/nvidia", "overlays/mixed")
FOLDERS = (*OVERLAYS, "standing", "export")
VERSION = "1.34"

pytestmark = pytest.mark.skipif(
    shutil.which("kustomize") is None and shutil.which("kubectl") is None, reason="no kustomize and no kubectl"
)


def closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# The fields of ray.io/v1 that the manifests may use, by KubeRay's API reference of v1.6 (docs.ray.io, KubeRay CRD API
# reference). Pod templates are checked by Kubernetes' own schema.
TEXT, NUMBER, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object"}
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
RAY_CLUSTER_SPEC = closed(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=closed(mode={"enum": ["token"]}, secretName=TEXT),
    headGroupSpec=closed(("template",), rayStartParams=PARAMETERS, template=ANY, serviceType=TEXT),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
            ("groupName", "template", "minReplicas", "maxReplicas"),
            groupName=TEXT, replicas=NUMBER, minReplicas=NUMBER, maxReplicas=NUMBER, numOfHosts=NUMBER,
            rayStartParams=PARAMETERS, template=ANY,
        ),
    },
)  # fmt: skip
RAY_JOB_SPEC = closed(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=NUMBER, activeDeadlineSeconds=NUMBER, ttlSecondsAfterFinished=NUMBER,
    shutdownAfterJobFinishes={"type": "boolean"}, suspend={"type": "boolean"},
    submitterConfig=closed(backoffLimit=NUMBER), submitterPodTemplate=ANY, rayClusterSpec=RAY_CLUSTER_SPEC,
)  # fmt: skip


@cache
def rendered(folder: str) -> dict[str, dict[str, Any]]:
    """Manifests by kind."""
    tool = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    done = subprocess.run([*tool, str(K8S / folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    manifests = [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]
    assert len({manifest["kind"] for manifest in manifests}) == len(manifests)
    return {manifest["kind"]: manifest for manifest in manifests}


def ray_cluster(folder: str) -> dict[str, Any]:
    manifests = rendered(folder)
    return manifests["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in manifests else manifests["RayCluster"]["spec"]


def pods(folder: str) -> dict[str, dict[str, Any]]:
    """Pod templates by what they are for."""
    manifests = rendered(folder)
    found = {}
    if "Job" in manifests:
        return {"export": manifests["Job"]["spec"]["template"]}
    if "RayJob" in manifests:
        found["submitter"] = manifests["RayJob"]["spec"]["submitterPodTemplate"]
    cluster = ray_cluster(folder)
    found["head"] = cluster["headGroupSpec"]["template"]
    return found | {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}


def check_ray(manifest: dict[str, Any]) -> None:
    assert manifest["apiVersion"] == "ray.io/v1"
    schema = RAY_JOB_SPEC if manifest["kind"] == "RayJob" else RAY_CLUSTER_SPEC
    Draft202012Validator(schema).validate(manifest["spec"])


def check_pod(name: str, template: dict[str, Any]) -> None:
    metadata = {"name": name, **template.get("metadata", {})}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_manifest_is_what_its_schema_says(folder: str) -> None:
    for kind, manifest in rendered(folder).items():
        if kind in ("RayJob", "RayCluster"):
            check_ray(manifest)
        else:
            kubernetes_validate.validate(manifest, VERSION, strict=True)
    for name, template in pods(folder).items():
        check_pod(name, template)


def test_the_checks_find_a_misspelt_field_in_a_pod_and_in_a_ray_job() -> None:
    job = json.loads(json.dumps(rendered("base")["RayJob"]))
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 1
    with pytest.raises(Exception, match="'replica' was unexpected"):
        check_ray(job)
    template = json.loads(json.dumps(pods("base")["head"]))
    template["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesytem"] = True
    with pytest.raises(Exception, match="readOnlyRootFilesytem"):
        check_pod("head", template)


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_are_confined(folder: str) -> None:
    for name, template in pods(folder).items():
        spec = template["spec"]
        user = spec["securityContext"]
        assert user["runAsNonRoot"] and user["runAsUser"] and user["seccompProfile"]["type"] == "RuntimeDefault", name
        assert spec["automountServiceAccountToken"] is False, name
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            confined = container["securityContext"]
            assert confined["readOnlyRootFilesystem"] and not confined["allowPrivilegeEscalation"], name
            assert confined["capabilities"] == {"drop": ["ALL"]}, name
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), name
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name
            assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"]), "nowhere to write"
            assert ":" in container["image"] and not container["image"].endswith("latest"), name
            if name not in ("submitter", "export"):
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys(), name
        assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "titan", "the network policy is for it"


@pytest.mark.parametrize("folder", (*OVERLAYS, "standing"))
def test_ray_wants_a_token_and_none_is_in_the_manifests(folder: str) -> None:
    assert ray_cluster(folder)["authOptions"] == {"mode": "token"}
    assert "Secret" not in rendered(folder)
    assert not re.search(r"RAY_AUTH|password|\b[0-9a-f]{32,}\b", json.dumps(rendered(folder)))


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_entrypoint_waits_for_the_nodes_there_are_and_the_run_fits_them(folder: str, tmp_path: Path) -> None:
    manifests, cluster = rendered(folder), ray_cluster(folder)
    (tmp_path / "run.toml").write_text(manifests["ConfigMap"]["data"]["run.toml"])
    words = shlex.split(manifests["RayJob"]["spec"]["entrypoint"])
    assert words[:5] == ["titan", "run", "/etc/titan/run.toml", "--resume", "--address"]
    nodes = 1 + sum(group["replicas"] for group in cluster["workerGroupSpecs"])
    assert words[words.index("--set") + 1] == f"cluster.nodes={nodes}"
    config = load_config(tmp_path / "run.toml", [words[words.index("--set") + 1], "cluster.address=auto"])
    slots: dict[str | None, float] = {}
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        each = int(limits.get("nvidia.com/gpu", 0)) or int(limits["cpu"]) * config.cluster.cpu_ranks_per_core
        kinds = json.loads(json.loads(group["rayStartParams"].get("resources", '"{}"')))
        assert all(count == each for count in kinds.values())
        kind = next(iter(kinds), None)
        slots[kind] = slots.get(kind, 0) + group["replicas"] * each
    for layout in role_layouts(config).values():
        for position in layout.positions:
            slots[position.device] -= len(position.ranks)
    assert all(left >= 0 for left in slots.values()), slots


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pods_leave_a_run_its_grace_before_they_end(folder: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(rendered(folder)["ConfigMap"]["data"]["run.toml"])
    grace_s = load_config(tmp_path / "run.toml").recovery.grace_s
    for name, pod in pods(folder).items():
        if name == "submitter":
            continue
        command = pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "-m", "titan.cluster.drain"]
        assert grace_s + 30 <= int(command[3]) < pod["spec"]["terminationGracePeriodSeconds"], name


def test_the_export_names_the_run_and_a_student_of_the_overlays(tmp_path: Path) -> None:
    words = rendered("export")["Job"]["spec"]["template"]["spec"]["containers"][0]["args"]
    for folder in OVERLAYS:
        (tmp_path / "run.toml").write_text(rendered(folder)["ConfigMap"]["data"]["run.toml"])
        config = load_config(tmp_path / "run.toml")
        assert words[:3] == ["titan", "export", f"{config.run.dir}/{config.run.name}"]
        assert words[words.index("--student") + 1] in [student.name for student in config.students]
    claim = rendered("base")["PersistentVolumeClaim"]["metadata"]["name"]
    assert pods("export")["export"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim
