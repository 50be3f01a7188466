"""cluster.yaml and deploy/: checked against Ray's schema and providers, and launched on a local AWS server."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("boto3", reason="needs the extra aws")

import boto3
import ray.autoscaler
from ray.autoscaler._private.node_provider_availability_tracker import (
    NodeAvailabilityRecord,
    NodeAvailabilitySummary,
)
from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_dmml.config.schema import Config
from ray_dmml.ray_backend import placement
from ray_dmml.ray_backend.autoscaling import spot_first

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
CLUSTER_FILE = ROOT / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    cluster: dict[str, Any] = yaml.safe_load(CLUSTER_FILE.read_text())
    return cluster


@pytest.mark.parametrize("file", ["cluster.yaml", "deploy/gcp.yaml", "deploy/on-prem.yaml"])
def test_ray_and_bash_accept_it(file: str) -> None:
    """By the schema of `ray up`. Bash parses each command, since YAML cuts a line at a #."""
    cluster = yaml.safe_load((ROOT / file).read_text())
    validate_config(prepare_config(cluster))
    for key in [key for key in cluster if key.endswith("_commands")]:
        for command in cluster[key]:
            subprocess.run(["bash", "-n", "-c", command], check=True)


def test_every_key_of_the_provider_is_read_by_ray(cluster: dict[str, Any]) -> None:
    """Ray's schema allows any key. So each key must occur in the source of its AWS provider, or be an argument of
    EC2's RunInstances."""
    aws = Path(ray.autoscaler.__file__).parent / "_private" / "aws"
    source = "".join(path.read_text() for path in aws.rglob("*.py"))
    for key in cluster["provider"].keys() - {"type"}:
        assert re.search(rf'(\[|get\()"{key}"', source), key
    for key in cluster["provider"]["security_group"]:
        assert f'"{key}"' in source, key
    ec2 = boto3.client("ec2", region_name="us-west-2")
    known = ec2.meta.service_model.operation_model("RunInstances").input_shape.members
    for node_type in cluster["available_node_types"].values():
        assert node_type["node_config"].keys() <= known.keys()


def test_tokens_are_on_and_the_dashboard_is_on_loopback(cluster: dict[str, Any]) -> None:
    """On the head and on the workers. The token is copied as a file."""
    head, worker = (
        next(line for line in cluster[f"{kind}_start_ray_commands"] if "ray start" in line)
        for kind in ("head", "worker")
    )
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token" in shlex.split(command)
    assert "--dashboard-host=127.0.0.1" in shlex.split(head)
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert any("RAY_AUTH_MODE=token" in command for command in cluster["setup_commands"])
    scorer = "RAY_AUTOSCALER_UTILIZATION_SCORER=ray_dmml.ray_backend.autoscaling.spot_first"
    assert scorer in shlex.split(head)


def test_on_demand_nodes_replace_unavailable_spot_nodes(cluster: dict[str, Any]) -> None:
    """Ray's autoscaler chooses nodes for three peers with a GPU each."""
    types = prepare_config(cluster)["available_node_types"]
    for name in ("gpu_spot", "gpu_on_demand"):
        types[name]["resources"] = {"CPU": 48, "GPU": 4}  # as Ray reads from AWS
    demand = [{"CPU": 8.0, "GPU": 1.0}] * 3

    def chosen(unavailable: str | None) -> dict[str, int]:
        record = NodeAvailabilityRecord(str(unavailable), False, 0.0, None)
        summary = NodeAvailabilitySummary({unavailable: record} if unavailable else {})
        scorer: Callable[..., Any] = partial(spot_first, node_availability_summary=summary)
        nodes, rest = get_nodes_for(types, {}, "head", 4, demand, scorer)
        assert not rest
        return dict(nodes)

    assert chosen(None) == {"gpu_spot": 1}
    assert chosen("gpu_spot") == {"gpu_on_demand": 1}
    assert chosen("gpu_on_demand") == {"gpu_spot": 1}


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A local AWS server with the instance profile of docs/how-to/cluster.md, and a home folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    settings = {
        "HOME": str(tmp_path),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-west-2",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: socket.create_connection(("127.0.0.1", port), timeout=1).close() is None)
        iam = boto3.client("iam")
        iam.create_role(RoleName="ray-dmml", AssumeRolePolicyDocument="{}")
        policy = (ROOT / "deploy" / "aws-policy.json").read_text()
        iam.put_role_policy(RoleName="ray-dmml", PolicyName="ray-dmml", PolicyDocument=policy)
        iam.create_instance_profile(InstanceProfileName="ray-dmml")
        iam.add_role_to_instance_profile(InstanceProfileName="ray-dmml", RoleName="ray-dmml")
        yield
    finally:
        server.kill()
        server.wait()


def wait_for(is_so: Callable[[], Any], seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if result := is_so():
                return result
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError("timed out")


def test_a_launch(aws: None, tmp_path: Path) -> None:
    """`ray up` starts the head of the file, in a group that opens only the port of ssh. Only workers of the spot
    type are spot instances. The test stops before ssh, which a local AWS server does not have."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    ec2 = boto3.client("ec2")

    def instances() -> list[dict[str, Any]]:
        return [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]

    up = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "up",
            "-y",
            "--no-config-cache",
            CLUSTER_FILE,
        ],
        env=os.environ,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        # An instance of moto gets its profile a moment after its start.
        [head] = wait_for(lambda: [i for i in instances() if "IamInstanceProfile" in i])
    finally:
        os.killpg(up.pid, 9)
        up.wait()
    assert head["InstanceType"] == "m6i.xlarge"
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/ray-dmml")
    assert [group["GroupName"] for group in head["SecurityGroups"]] == ["ray-dmml"]
    [group] = ec2.describe_security_groups(GroupNames=["ray-dmml"])["SecurityGroups"]
    from_outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in from_outside] == [(22, 22)]

    # The autoscaler on the head does this with the config that `ray up` has completed.
    config = prepare_config(yaml.safe_load(CLUSTER_FILE.read_text()))
    config = AWSNodeProvider.bootstrap_config(config)
    config = AWSNodeProvider.fillout_available_node_types_resources(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name in ("gpu_spot", "gpu_on_demand"):
        node_type = config["available_node_types"][name]
        assert node_type["resources"]["GPU"] == 4 and node_type["resources"]["CPU"] == 48
        known = {instance["InstanceId"] for instance in instances()}
        provider.create_node(node_type["node_config"], {"ray-node-kind": "worker"}, 1)
        [new] = [instance for instance in instances() if instance["InstanceId"] not in known]
        assert new["InstanceType"] == "g5.12xlarge"
        assert new.get("InstanceLifecycle") == ("spot" if name == "gpu_spot" else None)


def test_the_kubernetes_job_is_valid() -> None:
    """Our command line accepts its command. It has this version of Ray and tokens, only workers have GPUs, and
    every pod has the volumes that it mounts."""
    _, job = yaml.safe_load_all((ROOT / "deploy/kuberay.yaml").read_text())
    spec = job["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == ray.__version__
    head, *workers = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert all("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"] for pod in workers)
    for pod in (head, *workers):
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "ray-dmml"
    command = [sys.executable, "-m", "ray_dmml.cli", *arguments]
    command += ["--local", "--set", "data.download=false"]  # it ends where the images are missing
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "/shared/data/cub200" in result.stderr, result.stderr


def kuberay_node(group: dict[str, Any], **others: float) -> dict[str, float]:
    """The resources of a pod's node. KubeRay passes the pod's limits to `ray start`, or rayStartParams."""
    [container] = group["template"]["spec"]["containers"]
    limits, start = container["resources"]["limits"], group["rayStartParams"]
    cpus = float(start.get("num-cpus", limits["cpu"]))
    gpus = float(start.get("num-gpus", limits.get("nvidia.com/gpu", 0)))
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {}), **others}


def test_the_kubernetes_job_starts_with_enough_workers() -> None:
    """A run does not know how far KubeRay may grow. The plan on the head and minReplicas workers gives each peer a
    pod."""
    _, job = yaml.safe_load_all((ROOT / "deploy/kuberay.yaml").read_text())
    spec = job["spec"]["rayClusterSpec"]
    nodes = [kuberay_node(spec["headGroupSpec"], **{placement.HEAD: 1.0})]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
        nodes += [kuberay_node(group)] * group["minReplicas"]
    words = shlex.split(job["spec"]["entrypoint"])
    values = {key: words[words.index(f"--{key}") + 1] for key in ("config", "set")}
    config = Config.load(ROOT / values["config"], [values["set"]])
    assert nodes[0]["CPU"] == 0 and len(config.cohort.peers) == 2
    assert placement.plan(config, nodes, []) == [{"CPU": 8, "GPU": 1}] * 2
