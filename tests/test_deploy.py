"""cluster.yaml and the manifests in deploy/: valid for Ray, and consistent with what the code requires."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tccp.serving.server_settings import ServerSettings
from tccp.training.launcher.job import Allocation
from tccp.training.launcher.sizing import GPU_WORKER_CPUS, allocate

pytest.importorskip("ray")
pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def cluster_max(text: str) -> dict[str, float]:
    """The resources that TCCP_CLUSTER_MAX names."""
    (found,) = set(re.findall(r"(?:TCCP_CLUSTER_MAX=|TCCP_CLUSTER_MAX, value: \")CPU=(\d+),GPU=(\d+)", text))
    return {"CPU": float(found[0]), "GPU": float(found[1])}


def total_resources(kinds: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    return {name: float(sum(count * has.get(name, 0) for count, has in kinds)) for name in ("CPU", "GPU")}


def training_allocation(resources: dict[str, float]) -> Allocation:
    from tccp.config import DeepSpeedSettings

    return allocate(resources, workers=None, device="auto", parallel=DeepSpeedSettings())


def test_cluster_file_is_valid_for_ray_and_states_its_maximum_size() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load("cluster.yaml")
    validate_config(prepare_config(config))
    kinds = config["available_node_types"]
    assert kinds["head"]["resources"]["CPU"] == 0, "the head does no work"
    pools = {name: (kind["max_workers"], kind["resources"]) for name, kind in kinds.items() if name != "head"}
    assert cluster_max((ROOT / "cluster.yaml").read_text()) == total_resources(list(pools.values()))
    assert sum(most for most, _ in pools.values()) == config["max_workers"]
    _, train = pools["train"]
    assert train["CPU"] == train["GPU"] * GPU_WORKER_CPUS, "no CPUs left for data work beside the training workers"
    assert "GPU" not in pools["data"][1]
    found = training_allocation(cluster_max((ROOT / "cluster.yaml").read_text()))
    assert (found.use_gpu, found.workers) == (True, 8)
    commands = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert commands.count("RAY_AUTH_MODE=token") == 2
    assert commands.count("TCCP_CLUSTER_MAX=") == 2, "processes beside the ranks read it, too"


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_manifests_are_valid_for_rays_kubernetes_autoscaler(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    manifest = load(f"deploy/{name}.yaml")
    assert manifest["apiVersion"] == "ray.io/v1"
    spec = manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]
    cluster = {"metadata": {"name": "tccp", "namespace": "default"}, "spec": spec}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    kinds = config["available_node_types"]
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    assert spec["authOptions"] == {"mode": "token"}, "without a token anyone who reaches the head can run any code"
    if name == "rayjob":
        groups = [kind for key, kind in kinds.items() if key != "headgroup"]
        most = total_resources([(kind["max_workers"], kind["resources"]) for kind in groups])
        text = (ROOT / "deploy" / "rayjob.yaml").read_text()
        assert text.count("TCCP_CLUSTER_MAX,") == 1 + len(groups)
        assert cluster_max(text) == most
        assert training_allocation(most).workers == 8
        train = kinds["train"]["resources"]
        assert train["CPU"] == train["GPU"] * GPU_WORKER_CPUS
        assert manifest["spec"]["backoffLimit"] == 3
        assert "--resume" in manifest["spec"]["entrypoint"], "without it a second attempt is refused"


def test_service_configuration_is_valid_for_ray_serve() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    spec = load("deploy/rayservice.yaml")["spec"]
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (application,) = config.applications
    module, name = application.import_path.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    settings = ServerSettings.given(application.args)
    most = settings.max_replicas * settings.gpus_per_stage * 2  # of both stages
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert most > workers["minReplicas"], "the stages may grow beyond one machine"
    assert settings.store_url.startswith("postgresql://"), "several machines share the store"


def test_dashboard_and_alerts_name_metrics_that_the_server_reports() -> None:
    deployments = (ROOT / "tccp" / "serving" / "deployments.py").read_text()
    operation = (ROOT / "tccp" / "serving" / "api" / "operation.py").read_text()
    known = {"tccp_videos", "ray_tccp_attempts_total", "ray_tccp_stage_load"}
    known |= {f"ray_tccp_stage_{name}_total" for name in ("windows", "evaluations", "rows", "busy_s")}
    assert all(
        name.removeprefix("ray_").removesuffix("_total") in deployments + operation
        for name in ("tccp_videos", "ray_tccp_attempts_total", "ray_tccp_stage_load")
    )
    queries = [target["expr"] for panel in load("deploy/grafana.json")["panels"] for target in panel["targets"]]
    queries += [rule["expr"] for group in load("deploy/alerts.yaml")["groups"] for rule in group["rules"]]
    named = {name for query in queries for name in re.findall(r"\b(?:ray_)?tccp_\w+", query)}
    assert named and named <= known


def test_ray_versions_and_system_libraries_agree() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    (ray,) = re.findall(r"^ray==(\S+)", pins, re.M)
    for name in ("rayjob", "rayservice"):
        spec = load(f"deploy/{name}.yaml")["spec"]
        assert (spec.get("rayClusterSpec") or spec["rayClusterConfig"])["rayVersion"] == ray
    libraries = set(re.findall(r'"(lib[\w.-]+)",?$', (ROOT / ".ci" / "system_libraries.py").read_text(), re.M))
    packages = set((ROOT / "deploy" / "Dockerfile").read_text().split())
    assert libraries and libraries <= packages


def test_cluster_starts_mlflow_only_once() -> None:
    """The check for a running server must not match its own command line."""
    (line,) = (one for one in load("cluster.yaml")["head_setup_commands"] if "mlflow" in one)
    assert "pgrep" not in line and "/health" in line
