"""`marith deploy` without a cluster: the configuration that it writes, and mistakes as sentences."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray.serve", reason="needs Ray with Serve: pip install 'vllm-marith[ray]'")

from ray.serve.config import RequestRouterConfig
from ray.serve.schema import ServeDeploySchema

from vllm_marith import cli
from vllm_marith.distributed.arguments import parse, settings_of
from vllm_marith.distributed.serve import Arguments, build

ROOT = Path(__file__).parents[2]
RAY = ROOT / "configs" / "ray"
STEER = "terms: {loud: {system: Shout.}}\nformula: base - 0.5*loud\n"


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "steer.yaml").write_text(STEER)
    return folder


def marith(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["marith", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The configuration of a command line."""
    file = tmp_path / "serve.yaml"
    assert marith(monkeypatch, "deploy", *arguments, "--output", str(file)) == 0
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    ServeDeploySchema.model_validate(found)
    return found


def marith_setting(settings: dict[str, Any]) -> list[str]:
    return ["--additional-config", json.dumps({"marith": settings})]


def test_arguments_and_presets_are_in_the_configuration(monkeypatch, tmp_path: Path, presets: Path) -> None:
    """The engine is started with what was asked, but for the presets, which are there as text."""
    setting = {"presets": str(presets), "max_classifier_texts": 7}
    arguments = ["M", "--max-model-len", "2k", "-tp", "2", *marith_setting(setting), "--port", "8123"]
    config = written(monkeypatch, tmp_path, "--replicas", "3", "--gpus", "2", "--env", "A=b=c", *arguments)
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    assert deployment["num_replicas"] == 3
    assert deployment["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 2}
    assert deployment["user_config"] == {"presets": {"steer.yaml": STEER}}
    assert application["runtime_env"] == {"env_vars": {"A": "b=c"}}
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8123}
    there, here = parse(application["args"]["arguments"]), parse(arguments)
    assert (there.model, there.max_model_len, there.tensor_parallel_size) == ("M", 2000, 2)
    assert there.logits_processors == ["marith"]
    assert settings_of(there).presets == ()
    assert settings_of(there).max_classifier_texts == 7
    differing = {name for name, value in vars(there).items() if value != vars(here)[name]}
    assert differing == {"logits_processors", "additional_config"}
    assert str(tmp_path) not in json.dumps(config)  # nothing there is of this machine


@pytest.mark.parametrize(
    "spelling",
    [
        ["--additional-config={}"],
        ["--additional_config", "{}"],
        ["--additional-config.marith.presets", "{presets}"],
        ["--additional-config.marith.presets={presets}", "--additional-config.other.key", "1"],
    ],
)
def test_presets_are_found_however_they_are_written(
    monkeypatch, tmp_path, presets, spelling: list[str]
) -> None:
    whole = json.dumps({"marith": {"presets": str(presets)}})
    words = [word.replace("{presets}", str(presets)).replace("{}", whole) for word in spelling]
    config = written(monkeypatch, tmp_path, "M", *words, "--max-num-seqs", "9")
    (application,) = config["applications"]
    assert application["deployments"][0]["user_config"] == {"presets": {"steer.yaml": STEER}}
    assert str(presets) not in json.dumps(config)
    there = parse(application["args"]["arguments"])
    assert there.max_num_seqs == 9
    assert there.additional_config.get("other", {}) == ({"key": 1} if len(words) > 2 else {})


def test_as_many_replicas_as_the_load_asks_for(monkeypatch, tmp_path: Path) -> None:
    options = ["--autoscale", "1:4", "--max-ongoing", "64", "--drain", "30", "--sticky"]
    deployment = written(monkeypatch, tmp_path, "M", *options)["applications"][0]["deployments"][0]
    scaling = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 32}
    assert deployment["autoscaling_config"] == scaling
    assert "num_replicas" not in deployment
    assert deployment["max_ongoing_requests"] == 64
    assert deployment["graceful_shutdown_timeout_s"] == 30
    router = RequestRouterConfig.model_validate(deployment["request_router_config"])
    assert router.get_request_router_class().__name__ == "ConsistentHashRouter"


def test_ranks_of_one_engine_on_several_nodes_are_one_placement_group(monkeypatch, tmp_path: Path) -> None:
    options = ["-tp", "2", "--distributed-executor-backend", "ray", "--cpus", "3"]
    deployment = written(monkeypatch, tmp_path, "M", *options)["applications"][0]["deployments"][0]
    assert deployment["placement_group_bundles"] == [{"CPU": 3, "GPU": 1}, {"GPU": 1}]
    assert deployment["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 0}


def test_serve_can_build_it(monkeypatch, tmp_path: Path) -> None:
    """What the import path names, with what the configuration says."""
    (application,) = written(monkeypatch, tmp_path, "M", "--replicas", "2")["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    built = build(Arguments.model_validate(application["args"]))
    assert [application["deployments"][0]["name"]] == [built._bound_deployment.name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-model-len", "512"], "the model is missing"),
        (["M", "--bogus"], "vllm serve: unrecognized arguments: --bogus"),
        (["M", "--max-model-len", "x"], "vllm serve: argument --max-model-len: invalid"),
        (["M", "--autoscale", "4:1"], "--autoscale is MIN:MAX"),
        (["M", "--env", "A"], "--env is NAME=VALUE"),
        (["M", "--api-server-count", "2"], "ask for more replicas"),
        (["M", "--data-parallel-size", "2"], "ask for more replicas"),
        (["M", "--ssl-keyfile", "x"], "--ssl-keyfile has no place in a deployment"),
        (["M", "--uds", "x"], "--uds has no place in a deployment"),
        (["M", "--logits-processors", "a.b:C"], "name 'marith' among the --logits-processors, too"),
        (["M", "--enable-auto-tool-choice"], "requires --tool-call-parser"),
        (["M", *marith_setting({"presets": "/nowhere"})], "/nowhere: no such file or directory"),
        (["M", *marith_setting({"preset": "x"})], "known settings: "),
        (
            ["M", "--served-model-name", "steer", "PRESETS"],
            "the preset 'steer' has the name of the served model",
        ),
        (
            ["M", "--wait", "0", "--ray-address", "127.0.0.1:8265"],
            "such as http://HOST:8265, and not 127.0.0.1",
        ),
        (
            ["M", "--wait", "0", "--ray-address", "http://127.0.0.1:9"],
            "no Ray cluster answers at http://127.0.0.1:9",
        ),
    ],
)
def test_a_mistake_is_a_sentence(monkeypatch, capsys, presets: Path, arguments: list[str], said: str) -> None:
    if arguments[-1] == "PRESETS":
        arguments = [*arguments[:-1], *marith_setting({"presets": str(presets)})]
    dry = [] if "--wait" in arguments else ["--dry-run"]
    assert marith(monkeypatch, "deploy", *arguments, *dry) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.splitlines()[-1].startswith("marith: ")
    assert "Traceback" not in shown.err


def test_help(monkeypatch, capsys) -> None:
    assert marith(monkeypatch, "deploy", "--help") == 0
    assert "--autoscale MIN:MAX" in capsys.readouterr().out


# ---- What lies in configs/ray


def test_the_configuration_that_comes_with_us_is_what_its_command_writes(monkeypatch, tmp_path: Path) -> None:
    text = (RAY / "serve.yaml").read_text()
    command = shlex.split(re.search(r"^#\s+marith (deploy .*\n#  .*)", text, re.M)[1].replace("\n#", " "))
    at = command.index("--output")
    assert command[at + 1] == "configs/ray/serve.yaml"
    monkeypatch.chdir(ROOT)
    assert written(monkeypatch, tmp_path, *command[1:at], *command[at + 2 :]) == yaml.safe_load(text)


def test_the_ray_service_serves_that_configuration() -> None:
    """KubeRay gives serveConfigV2 to Serve as it is."""
    service = yaml.safe_load((RAY / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert config == yaml.safe_load((RAY / "serve.yaml").read_text())
    (deployment,) = ServeDeploySchema.model_validate(config).applications[0].deployments
    cluster = service["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    (worker,) = workers["template"]["spec"]["containers"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert worker["image"] == head["image"]
    # Every replica that autoscaling may ask for has its GPU on some node, and its time to drain.
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"]) * workers["maxReplicas"]
    needed = deployment.ray_actor_options.num_gpus * deployment.autoscaling_config["max_replicas"]
    assert gpus >= needed
    grace = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > deployment.graceful_shutdown_timeout_s
    assert {port["name"]: port["containerPort"] for port in head["ports"]}["serve"] == config["http_options"][
        "port"
    ]


def test_the_image_has_what_it_copies() -> None:
    """Instructions that Docker knows, the tested vLLM and Ray, and files that are there."""
    lines = (RAY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert steps[0] == ["FROM", "vllm/vllm-openai:v0.32.0"]
    assert {word for word, _ in steps} <= {"FROM", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}
    for word, rest in steps:
        if word == "COPY":
            *sources, target = rest.split()
            assert all((ROOT / source).exists() for source in sources)
            assert target.endswith("/") or len(sources) == 1
        elif word in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list)
    assert any("[ray]" in rest for word, rest in steps if word == "RUN")
    service = yaml.safe_load((RAY / "rayservice.yaml").read_text())
    locked = re.search(r"^ray==(\S+)$", (ROOT / "requirements" / "cpu-py311.txt").read_text(), re.M)[1]
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == locked
