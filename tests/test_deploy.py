"""The files in ``deploy/``, as far as they can be checked without a cloud: by Ray's own schema, KubeRay's fields and ours."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from search import build_parser, given
from tune.cluster.nodes import address_of, room
from tune.spec import SweepSpec, make_spec

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


def loaded(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def parsed(command: str) -> tuple[Any, SweepSpec]:
    """A ``python search.py`` command line, read by our own parser and checked as ``launch`` does."""
    program, script, *arguments = shlex.split(command)
    assert (program, Path(script).name) == ("python", "search.py")
    options = build_parser().parse_args(arguments)
    return options, make_spec(given(options))


def pinned(package: str) -> str:
    """The version that pyproject.toml pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    (found,) = (line.partition("==")[2] for line in lines if re.split(r"[\[=<>]", line)[0] == package)
    return found


# -- the Ray launcher -------------------------------------------------------------------------------------------------


def launcher_accepts(config: dict[str, Any]) -> None:
    """What ``ray up`` does with a file before it asks the cloud for anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


def test_the_launcher_takes_the_file() -> None:
    launcher_accepts(loaded("ray-cluster.yaml"))


@pytest.mark.parametrize("change", [{"no_such_field": 1}, {"head_node_type": "gone"}, {"max_workers": "many"}])
def test_the_launcher_refuses_what_is_wrong(change: dict[str, Any]) -> None:
    import jsonschema

    with pytest.raises((jsonschema.ValidationError, ValueError)):
        launcher_accepts(loaded("ray-cluster.yaml") | change)


def test_what_is_to_be_filled_in_is_said_at_the_top() -> None:
    text = (DEPLOY / "ray-cluster.yaml").read_text()
    header, _, body = text.partition("\n\n")
    known = {"CPU", "GPU", "RAY_HEAD_IP", "VIRTUAL_ENV"}
    fields = {"InstanceType", "Ebs"}
    placeholders = set(re.findall(r"\b[A-Z][A-Z_]{2,}[A-Z]\b", re.sub(r"#.*", "", body))) - known - fields
    assert placeholders == {"REGION", "FILE_SYSTEM_ID", "SECURITY_GROUP_ID"}
    assert all(word in header for word in placeholders)


def test_every_node_of_the_launcher_has_the_locked_packages() -> None:
    """Ray refuses nodes whose Python or Ray differs."""
    config = loaded("ray-cluster.yaml")
    setup = "\n".join(config["setup_commands"])
    assert f"uv=={pinned('uv')}" in setup
    assert "uv pip sync ~/noisy-label-search/requirements.lock" in setup
    assert "--python 3.11" in setup
    assert config["file_mounts"]["/home/ubuntu/noisy-label-search"] == "."
    for kind in ("head", "worker"):
        for command in config[f"{kind}_start_ray_commands"]:
            assert command.startswith("source ~/noisy-label-search/deploy/environment.sh; ")


def test_the_commands_are_bash(tmp_path: Path) -> None:
    config = loaded("ray-cluster.yaml")
    names = [name for name in config if name.endswith("_commands")]
    assert len(names) == 4
    commands = [command for name in names for command in config[name]]
    for text in [*commands, (DEPLOY / "environment.sh").read_text()]:
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (text, done.stderr)


def test_the_environment_is_what_the_program_reads(tmp_path: Path) -> None:
    script = f"source {DEPLOY / 'environment.sh'}; env"
    done = subprocess.run(["bash", "-c", script], env={"HOME": "/h", "PATH": "/bin:/usr/bin"}, capture_output=True, text=True)
    held = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert held["PATH"] == "/h/venv/bin:/bin:/usr/bin"
    assert held["RAY_AUTH_MODE"] == "token"
    assert held["RAY_AUTH_TOKEN_PATH"] == "/h/.ray/auth_token"
    assert loaded("ray-cluster.yaml")["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert int(held["RAY_JOB_STOP_WAIT_TIME_S"]) > 10, "a stop takes up to 10 s"
    assert {"NOISY_LABEL_CACHE", "NOISY_LABEL_DATA"} <= set(held)


# -- KubeRay ----------------------------------------------------------------------------------------------------------

# The fields of KubeRay 1.5's custom resource, with + those that it requires.
FIELDS = {
    "job": "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus entrypointNumGpus "
    "entrypointResources jobId managedBy metadata rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes submissionMode "
    "submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished",
    "cluster": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec+ "
    "headServiceAnnotations managedBy rayVersion suspend upgradeStrategy workerGroupSpecs",
    "head": "enableIngress headService labels rayStartParams resources serviceType template+",
    "worker": "groupName+ idleTimeoutSeconds labels maxReplicas+ minReplicas+ numOfHosts rayStartParams replicas resources "
    "scaleStrategy suspend template+",
}


def check_fields(kind: str, held: dict[str, Any]) -> None:
    words = FIELDS[kind].split()
    assert set(held) <= {word.rstrip("+") for word in words}, kind
    assert {word.rstrip("+") for word in words if word.endswith("+")} <= set(held), kind


@pytest.fixture
def job() -> dict[str, Any]:
    found: dict[str, Any] = loaded("rayjob.yaml")
    return found


def pods(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pods of the cluster by name."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in {"head": cluster["headGroupSpec"], **groups}.items()}


def commands(job: dict[str, Any]) -> dict[str, str]:
    """The two command lines of the entry point, by verb."""
    shell, flag, script = shlex.split(job["spec"]["entrypoint"])
    assert (shell, flag) == ("sh", "-c")
    found = re.findall(r"python /app/search\.py (\w+) [^;]+", script)
    return {verb: re.search(rf"python /app/search\.py {verb} [^;]+", script)[0] for verb in found}  # type: ignore[index]


def test_the_job_has_kuberays_fields(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    check_fields("job", spec)
    check_fields("cluster", spec["rayClusterSpec"])
    check_fields("head", spec["rayClusterSpec"]["headGroupSpec"])
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        check_fields("worker", group)
        assert 0 <= group["minReplicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert all(isinstance(value, str) for value in spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].values())
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_one_image_with_the_locked_ray(job: dict[str, Any]) -> None:
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray") == version("ray")
    submitter = job["spec"]["submitterPodTemplate"]["spec"]
    images = [container["image"] for pod in [*pods(job).values(), submitter] for container in pod["containers"]]
    assert len(images) == 3
    assert len(set(images)) == 1
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"uv=={pinned('uv')}" in dockerfile
    assert "requirements.lock" in dockerfile
    assert "FROM python:3.11" in dockerfile
    assert re.search(r"^WORKDIR /app$", dockerfile, re.MULTILINE)


def test_the_entry_point_is_a_command_of_ours(job: dict[str, Any]) -> None:
    both = commands(job)
    options, spec = parsed(both["launch"])
    assert address_of(spec) == "auto"
    again, _ = parsed(both["resume"])
    assert (again.verb, again.name, again.storage) == ("resume", options.name, options.storage)
    for pod in pods(job).values():  # the storage is the shared claim, at one place
        claims = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
        (mounted,) = (m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] in claims)
        assert Path(options.storage).is_relative_to(mounted)


def test_the_entry_point_goes_on_where_the_sweep_is_there(job: dict[str, Any], tmp_path: Path) -> None:
    """As KubeRay hands it on: split into words by a shell, joined again by ``ray job submit``, run by a shell. A sweep that was
    stopped is a job that has ended well; whatever else it ends with is the job's."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$2"; exit "$CODE"\n')
    (tmp_path / "python").chmod(0o755)
    entry = job["spec"]["entrypoint"].replace("/storage", str(tmp_path))
    command = shlex.join(shlex.split(entry))

    def run(code: int) -> tuple[int, str]:
        env = {"PATH": f"{tmp_path}:/bin:/usr/bin", "CODE": str(code)}
        done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    ends = {0: 0, 1: 1, 2: 2, 7: 7, 130: 0, 137: 137, 143: 0}
    assert {code: run(code) for code in ends} == {code: (end, "launch\n") for code, end in ends.items()}
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert run(0) == (0, "launch\n"), "a folder is no sweep"
    (tmp_path / "runs" / "first" / "sweep.yaml").touch()
    said = "and not launch after it, where it fails"
    assert {code: run(code) for code in ends} == {code: (end, "resume\n") for code, end in ends.items()}, said


def test_the_nodes_hold_what_is_asked_for(job: dict[str, Any]) -> None:
    _, spec = parsed(commands(job)["launch"])
    held = 0
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert container["resources"]["requests"] == limits, "a node has what its trials were promised"
        resources = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
        held += group["maxReplicas"] * room(resources, spec)
    assert spec.concurrent == held > 0
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_every_mount_has_its_volume(job: dict[str, Any]) -> None:
    for name, pod in pods(job).items():
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == volumes, name
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert environment["NOISY_LABEL_CACHE"] in mounts.values()
        assert Path(environment["NOISY_LABEL_DATA"]).parent == Path(mounts["storage"])


def test_a_stopped_job_has_time_to_save(job: dict[str, Any]) -> None:
    (container,) = pods(job)["head"]["containers"]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > 10


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_are_ours() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    found = re.findall(r"python search\.py [a-z][^`'\"\n#|]+", text)
    assert len(found) >= 5
    for command in found:
        build_parser().parse_args(shlex.split(command)[2:])
    for name in re.findall(r"deploy/([\w.-]+)", text):
        assert (DEPLOY / name).exists(), name
