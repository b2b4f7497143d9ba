"""k8s/rayjob.yaml and eks.yaml keep KubeRay's structure, what the run needs, and command lines that the jobs take."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from jobs.doctor import DoctorConfig
from jobs.training.config import TrainConfig
from tests import ROOT

CODE = "/home/ray/alexnet"
EKS_POLICY = {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}

# KubeRay 1.6, ray.io_rayjobs.yaml: of each part that we use, which fields it knows, those that it requires marked "!".
RAY_JOB = (
    "entrypoint shutdownAfterJobFinishes ttlSecondsAfterFinished activeDeadlineSeconds backoffLimit rayClusterSpec!"
)
RAY_CLUSTER = "rayVersion authOptions headGroupSpec! workerGroupSpecs enableInTreeAutoscaling"
HEAD = "rayStartParams template!"
WORKERS = "groupName! replicas minReplicas maxReplicas rayStartParams template!"
POD = "serviceAccountName terminationGracePeriodSeconds tolerations containers! volumes nodeSelector"
CONTAINER = "name! image resources volumeMounts ports"


@pytest.fixture
def job() -> dict[str, Any]:
    job = yaml.safe_load((ROOT / "k8s" / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec: dict[str, Any] = job["spec"]
    return spec


def test_its_fields_are_those_that_kuberay_knows(job: dict[str, Any]) -> None:
    cluster = job["rayClusterSpec"]
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    pods = [group["template"]["spec"] for group in (head, *groups)]
    containers = [container for pod in pods for container in pod["containers"]]
    parts = {RAY_JOB: [job], RAY_CLUSTER: [cluster], HEAD: [head], WORKERS: groups, POD: pods, CONTAINER: containers}
    for fields, found in parts.items():
        for part in found:
            assert part.keys() <= set(fields.replace("!", "").split())
            assert {name[:-1] for name in fields.split() if name.endswith("!")} <= part.keys()


def test_it_runs_the_doctor_then_training_as_the_nodes_allow(job: dict[str, Any]) -> None:
    cluster = job["rayClusterSpec"]
    [group] = cluster["workerGroupSpecs"]
    pod = group["template"]["spec"]
    [worker] = pod["containers"]
    [head] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    *shell, text = shlex.split(job["entrypoint"])
    doctor, training = (shlex.split(command) for command in text.split("&&"))
    assert (shell, doctor[:2]) == (["bash", "-c"], ["python", f"{CODE}/jobs/doctor.py"])
    assert training[:2] == ["python", f"{CODE}/jobs/train.py"]
    run = tyro.cli(TrainConfig, args=training[2:])
    checked = tyro.cli(DoctorConfig, args=doctor[2:])
    assert (checked.data, checked.storage, checked.stage) == (run.data, run.storage, run.stage)
    assert (str(checked.workers), checked.gpus) == (str(run.workers), run.gpus)
    assert all(location.startswith("s3://BUCKET/") for location in (run.data, run.storage))

    # The image has the code and the locked Ray.
    image = (ROOT / "Dockerfile").read_text()
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert cluster["rayVersion"] == locked[1]
    assert f"FROM rayproject/ray:{locked[1]}-py311" in image
    assert all(f"COPY {name} {CODE}/{name}\n" in image for name in ("jobs", "model", "pipeline"))
    assert worker["image"] == head["image"]

    # A GPU for each worker, none for the head; a token; room on the node for ImageNet's decoded pixels.
    limits = worker["resources"]["limits"]
    assert run.gpus is True
    assert str(run.workers) == str(int(limits["nvidia.com/gpu"]) * group["replicas"])
    assert worker["resources"]["requests"] == limits
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"]["mode"] == "token"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in worker["volumeMounts"]}
    room = re.fullmatch(r"(\d+)Gi", mounts[str(run.stage)]["emptyDir"]["sizeLimit"])
    assert room is not None
    assert int(room[1]) * 2**30 > 262e9
    assert "/dev/shm" not in mounts  # KubeRay mounts it, as large as the pod's memory.

    # It drains in order, continues after a loss, and costs no more than is meant.
    assert pod["terminationGracePeriodSeconds"] > 30
    assert run.max_failures > 0
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"] is True
    assert 0 < job["activeDeadlineSeconds"] <= 7 * 24 * 3600
    assert group["maxReplicas"] == group["replicas"]


def test_the_pages_commands_leave_no_name_to_replace(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cluster-kubernetes.md").read_text()
    edits = [shlex.split(line) for line in re.findall("^sed .*", page, re.MULTILINE)]
    (tmp_path / "k8s").mkdir()
    for name in ("rayjob.yaml", "eks.yaml"):
        shutil.copy(ROOT / "k8s" / name, tmp_path / "k8s")
        # Those of Google's section and of AWS's, one after the other.
        for edit in edits:
            if edit[-1] == f"k8s/{name}":
                subprocess.run(edit, cwd=tmp_path, check=True)
        text = (tmp_path / "k8s" / name).read_text()
        assert "your-bucket" in text
        assert not re.search("BUCKET|REGISTRY|s3://", text)


def test_the_eks_cluster_keeps_no_gpu_node_and_opens_one_bucket(job: dict[str, Any]) -> None:
    cluster = yaml.safe_load((ROOT / "k8s" / "eks.yaml").read_text())
    [group] = [group for group in cluster["managedNodeGroups"] if group["name"] == "gpu"]
    assert (group["minSize"], group["desiredCapacity"], group["spot"]) == (0, 0, True)
    pod = job["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert [taint["key"] for taint in group["taints"]] == [one["key"] for one in pod["tolerations"]]
    roles = {one["serviceAccountName"]: one for one in cluster["iam"]["podIdentityAssociations"]}
    statements = roles[pod["serviceAccountName"]]["permissionPolicy"]["Statement"]
    assert {action for one in statements for action in one["Action"]} == EKS_POLICY
    assert all(one["Resource"].startswith("arn:aws:s3:::BUCKET") for one in statements)
    assert "cluster-autoscaler" in roles
    assert "eks-pod-identity-agent" in [addon["name"] for addon in cluster["addons"]]
