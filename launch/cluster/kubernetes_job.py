"""A plan as a Kubernetes Indexed Job: one pod a node, which find each other through a headless Service."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import yaml

from cfusion.errors import CfusionError, ConfigError
from launch.cluster.cluster_plan import FINAL, MAX_RESTARTS, REQUEUE, SHUTDOWN_SECONDS, LaunchPlan

PORT = 29400


@dataclass(frozen=True)
class K8sOptions:
    """What differs from cluster to cluster.

    Attributes:
        image: Container image with cfusion in it.
        claim: PersistentVolumeClaim that all nodes mount at `folder`; the run's data and its state lie there, as what
            a pod writes elsewhere ends with it.
        folder: Working folder of the run.
        secret: Secret whose entries become environment variables, such as MLFLOW_TRACKING_PASSWORD.
    """

    image: str
    claim: str
    folder: str = "/work"
    secret: str | None = None


def k8s_manifest(plan: LaunchPlan, options: K8sOptions) -> str:
    """The manifest of a plan: a Service and a Job, as YAML.

    A pod that leaves with 75, or that the cluster takes away, is started again and not counted; one that leaves with 2
    or 3 ends the job, as it would leave so again. The first node's end is the job's. After the plan's hours the job is
    ended for good, its state saved.
    """
    return yaml.safe_dump_all([_service(plan), _job(plan, options)], sort_keys=False, width=120)


def submit_k8s(manifest: str) -> str:
    """Apply the manifest with kubectl; returns what kubectl said.

    Raises:
        ConfigError: There is no kubectl here.
        CfusionError: kubectl refused the manifest.
    """
    if shutil.which("kubectl") is None:
        raise ConfigError("kubectl is not on the PATH of this machine.", "Use --dry-run --out FILE, and apply it.")
    done = subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CfusionError(f"kubectl refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def _service(plan: LaunchPlan) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": plan.name},
        # Without publishNotReadyAddresses the first node's name resolves only after the others have needed it.
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": plan.name},
        },
    }


def _job(plan: LaunchPlan, options: K8sOptions) -> dict[str, Any]:
    nodes = plan.resources.nodes
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": plan.name},
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": MAX_RESTARTS * nodes,
            **({"activeDeadlineSeconds": round(plan.resources.hours * 3600)} if plan.resources.hours else {}),
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onExitCodes": _codes(*FINAL)},
                    {"action": "Ignore", "onExitCodes": _codes(REQUEUE)},
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
            "template": {"spec": _pod(plan, options)},
        },
    }


def _codes(*values: int) -> dict[str, Any]:
    return {"containerName": "train", "operator": "In", "values": list(values)}


def _pod(plan: LaunchPlan, options: K8sOptions) -> dict[str, Any]:
    # NCCL and torch's workers communicate through /dev/shm, which is 64 MiB in a container by default.
    volumes = [
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        {"name": "work", "persistentVolumeClaim": {"claimName": options.claim}},
    ]
    mounts = [
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - a mount point, not a file in a shared folder
        {"name": "work", "mountPath": options.folder},
    ]
    return {
        "subdomain": plan.name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 2 * SHUTDOWN_SECONDS,
        "containers": [_container(plan, options) | {"volumeMounts": mounts}],
        "volumes": volumes,
    }


def _container(plan: LaunchPlan, options: K8sOptions) -> dict[str, Any]:
    resources = plan.resources
    limits = {"nvidia.com/gpu": resources.gpus} if resources.gpus else {}
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    own = {
        "name": "train",
        "image": options.image,
        "workingDir": options.folder,
        "command": plan.agent(endpoint=f"{plan.name}-0.{plan.name}:{PORT}", run_id=plan.name),
        "env": [
            {"name": "NODE_RANK", "valueFrom": index},
            *({"name": key, "value": value} for key, value in plan.environment().items()),
        ],
        "resources": {
            "requests": {"cpu": str(resources.cpus * resources.processes_per_node)},
            **({"limits": limits} if limits else {}),
        },
    }
    return own | ({"envFrom": [{"secretRef": {"name": options.secret}}]} if options.secret else {})
