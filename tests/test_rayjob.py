"""k8s/rayjob.yaml keeps KubeRay's structure, what the run needs, and command lines that the jobs take."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from jobs.doctor import DoctorConfig
from jobs.training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
Job = dict[str, Any]

# KubeRay 1.6, ray.io_rayjobs.yaml: of each part that we use, which fields it knows, those that it requires marked "!".
RAY_JOB = (
    "entrypoint shutdownAfterJobFinishes ttlSecondsAfterFinished activeDeadlineSeconds backoffLimit rayClusterSpec!"
)
RAY_CLUSTER = "rayVersion authOptions headGroupSpec! workerGroupSpecs enableInTreeAutoscaling"
HEAD = "rayStartParams template!"
WORKERS = "groupName! replicas minReplicas maxReplicas rayStartParams template!"
POD = "serviceAccountName terminationGracePeriodSeconds tolerations containers! volumes nodeSelector"
CONTAINER = "name! image resources volumeMounts ports"
SIZES = {"": 1, "Mi": 2**20, "Gi": 2**30}


@pytest.fixture
def job() -> Job:
    return yaml.safe_load((ROOT / "k8s" / "rayjob.yaml").read_text())


def structure_faults(job: Job) -> Iterator[str]:
    """Where the file has a field that KubeRay does not know, or lacks one that it requires."""

    def fields(where: str, part: Job, known: str) -> Iterator[str]:
        names = {name.rstrip("!") for name in known.split()}
        yield from (f"{where} has {name}" for name in part if name not in names)
        yield from (f"{where} lacks {n[:-1]}" for n in known.split() if n.endswith("!") and not part.get(n[:-1]))

    def pod(where: str, template: Job) -> Iterator[str]:
        yield from fields(where, template["spec"], POD)
        for container in template["spec"].get("containers", []):
            yield from fields(f"{where} container", container, CONTAINER)
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            yield from (
                f"{where} mounts no volume {name}"
                for name in mounts - {volume["name"] for volume in template["spec"].get("volumes", [])}
            )

    yield from fields("file", job, "apiVersion! kind! metadata! spec!")
    if (job["apiVersion"], job["kind"]) != ("ray.io/v1", "RayJob"):
        yield "not a RayJob of ray.io/v1"
    yield from fields("spec", job["spec"], RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    yield from fields("cluster", cluster, RAY_CLUSTER)
    yield from fields("head", cluster["headGroupSpec"], HEAD)
    yield from pod("head", cluster["headGroupSpec"]["template"])
    for group in cluster["workerGroupSpecs"]:
        yield from fields("workers", group, WORKERS)
        yield from pod("workers", group["template"])


def size(quantity: str) -> int:
    """Bytes of a Kubernetes quantity."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * SIZES[unit]


def promise_faults(job: Job) -> set[str]:
    """What the file must say for the run to be right, and does not."""
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    [group] = cluster["workerGroupSpecs"]
    pod = group["template"]["spec"]
    [worker] = pod["containers"]
    [head] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in worker.get("volumeMounts", [])}
    shell, option, text = shlex.split(spec["entrypoint"])
    doctor, training = (shlex.split(command) for command in text.split("&&"))
    python, script, *flags = training
    run = tyro.cli(TrainConfig, args=flags)
    checked = tyro.cli(DoctorConfig, args=doctor[2:])
    limits = worker["resources"]["limits"]
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    image = (ROOT / "Dockerfile").read_text()
    promises = {
        "doctor first": (shell, option, doctor[1]) == ("bash", "-c", script.replace("train.py", "doctor.py"))
        and (checked.data, checked.storage, checked.stage) == (run.data, run.storage, run.stage)
        and (str(checked.workers), checked.gpus) == (str(run.workers), run.gpus),
        "runs training": python == "python" and Path(script).is_relative_to("/home/ray/alexnet"),
        "script in the image": (ROOT / Path(script).relative_to("/home/ray/alexnet")).is_file()
        and all(f"COPY {name} /home/ray/alexnet/{name}\n" in image for name in ("jobs", "model", "pipeline")),
        "locked Ray everywhere": cluster["rayVersion"] == locked[1]
        and f"FROM rayproject/ray:{locked[1]}-py311" in image,
        "one image": worker["image"] == head["image"],
        "token": cluster.get("authOptions", {}).get("mode") == "token",
        "a GPU for each worker": run.gpus is True
        and str(run.workers) == str(int(limits["nvidia.com/gpu"]) * group["replicas"])
        and worker["resources"]["requests"] == limits,
        "head trains nothing": cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") == "0",
        "in an object store": all(location.startswith("s3://BUCKET/") for location in (run.data, run.storage)),
        "staged on the node": run.stage is not None and bool({"emptyDir", "hostPath"} & set(mounts.get(run.stage, ()))),
        # ImageNet's decoded pixels.
        "room to stage": size(mounts[str(run.stage)].get("emptyDir", {}).get("sizeLimit", "0")) > 252e9,
        # KubeRay mounts it, as large as the pod's memory.
        "shared memory": "/dev/shm" not in mounts,
        "time to drain": pod.get("terminationGracePeriodSeconds", 30) > 30,
        "cost bounded": spec.get("shutdownAfterJobFinishes") is True
        and 0 < spec.get("activeDeadlineSeconds", 0) <= 7 * 24 * 3600
        and group["maxReplicas"] == group["replicas"],
        "continued after a loss": run.max_failures > 0 and spec.get("backoffLimit", 0) > 0,
    }
    return {name for name, kept in promises.items() if not kept}


def test_it_is_what_kuberay_takes_and_training_needs(job: Job) -> None:
    assert list(structure_faults(job)) == []
    assert promise_faults(job) == set()


def test_a_flag_that_training_does_not_have_is_refused(job: Job) -> None:
    job["spec"]["entrypoint"] = job["spec"]["entrypoint"].replace("--max-failures", "--gpu-count 8 --max-failures")
    with pytest.raises(SystemExit):
        promise_faults(job)
