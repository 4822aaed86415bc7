"""cluster.yaml and the manifest for Kubernetes: valid by Ray's own rules, pinned, closed to the outside."""

from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).parent.parent
tomllib = pytest.importorskip("tomllib")


@pytest.fixture
def cluster():
    return yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())


@pytest.fixture
def job():
    return yaml.safe_load((REPOSITORY / "docs" / "kuberay-rayjob.yaml").read_text())


def test_ray_takes_the_cluster_file(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    most = sum(kind["max_workers"] for kind in prepared["available_node_types"].values())
    assert 0 < prepared["max_workers"] <= most


def test_no_machine_can_be_reached_from_the_internet(cluster):
    assert cluster["provider"]["use_internal_ips"] is True
    assert "security_group" not in cluster["provider"], "Ray would make one that is open for SSH"
    assert cluster["auth"]["ssh_proxy_use_node_id"] is True
    start = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    for kind in cluster["available_node_types"].values():
        machine = kind["node_config"]
        assert machine["SecurityGroupIds"], "left out, Ray makes one that is open for SSH"
        assert machine["SubnetId"]
        assert "NetworkInterfaces" not in machine


def test_a_token_is_asked_for_everywhere(cluster):
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_every_machine_has_its_own_narrow_role_and_encrypted_disks(cluster):
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Arn"] for name, kind in types(cluster)}
    assert len(set(profiles.values())) == 2
    assert [name for name, profile in profiles.items() if profile.endswith("/recgpt-head")] == ["head"]
    for _, kind in types(cluster):
        machine = kind["node_config"]
        assert machine["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        assert all(disk["Ebs"]["Encrypted"] is True for disk in machine["BlockDeviceMappings"])


def types(cluster):
    return cluster["available_node_types"].items()


def test_what_costs_money_ends_by_itself(cluster):
    assert 0 < cluster["idle_timeout_minutes"] <= 30
    assert cluster["provider"]["cache_stopped_nodes"] is False
    assert all(kind["min_workers"] == 0 for _, kind in types(cluster))
    spot = [name for name, kind in types(cluster) if "InstanceMarketOptions" in kind["node_config"]]
    assert spot == ["recall"], "a training must not lose a machine every hour"
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_versions_are_pinned_and_fit_the_package(cluster):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    allowed = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    pinned = [
        word.strip('"') for command in cluster["setup_commands"] for word in command.split() if "==" in word
    ]
    assert {Requirement(one).name for one in pinned} == {"torch", "ray", "deepspeed"}
    for requirement in map(Requirement, pinned):
        (version,) = requirement.specifier
        assert version.operator == "=="
        assert Version(version.version) in allowed[requirement.name]


def test_both_files_speak_of_the_same_ray(cluster, job):
    ray = next(word for command in cluster["setup_commands"] for word in command.split() if "ray[" in word)
    assert ray.strip('"').endswith(f"=={job['spec']['rayClusterSpec']['rayVersion']}")


def test_the_job_for_kubernetes_has_what_its_resource_definition_asks_for(job):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = cluster["workerGroupSpecs"]
    assert all(0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups)
    for template in [cluster["headGroupSpec"]["template"], *(group["template"] for group in groups)]:
        (container,) = template["spec"]["containers"]
        assert "@sha256:" in container["image"]
        assert container["securityContext"]["runAsNonRoot"] is True
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert all(isinstance(value, str) for value in container["resources"]["limits"].values())


def test_the_command_of_the_job_is_one(job):
    import shlex

    import typer

    from ray_jobs.train import app

    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "ray_jobs.train"]
    command = typer.main.get_command(app)
    parsed = command.make_context("train", words[3:]).params
    assert parsed["workers"] == "1:4"
    assert parsed["max_failures"] == 10
