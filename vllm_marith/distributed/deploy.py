"""`marith deploy`: a Serve configuration from the arguments of `vllm serve`, and its way to a cluster.

The configuration is Serve's own (`ray.serve.schema.ServeDeploySchema`), so that the same file serves
`marith deploy`, `serve deploy` and the RayService of KubeRay.  It is applied through the REST interface of
the cluster's dashboard, as `serve deploy` does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.serve.schema import ServeDeploySchema

from vllm_marith.engine.plugin import ALIAS, PROCESSOR
from vllm_marith.language import PresetError
from vllm_marith.serving.naming import check_names

from . import preset_files
from .arguments import parse, settings_of, without_presets
from .errors import DeploymentError
from .serve import DEPLOYMENT, build

IMPORT_PATH = f"{build.__module__}:{build.__name__}"
STICKY = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
"""Serve's router that keeps an `x-session-id` on one replica, whose prefix cache knows its prompts."""

_POLL_SECONDS = 1.0
_HEALTH_SECONDS = 5.0
_BUSY_SHARE = 0.5
"""Share of `max_ongoing` from which on autoscaling adds a replica."""


@dataclass(frozen=True)
class Asked:
    """What the command line asks of a deployment.

    Attributes:
        arguments: as they stand behind `vllm serve`, the model first.
        name: of the Serve application.
        replicas: engines, each with its own weights and KV cache.
        autoscale: smallest and largest number of replicas, instead of a fixed one.
        cpus, gpus: that Ray sets aside for a replica; gpus None: one for each rank, or none
            where the vLLM of this machine is its CPU build.
        environment: variables of the replicas' processes.
        drain_seconds: how long a replica that is to end may take to finish what it has accepted.
        max_ongoing: requests that a replica is given at a time; more wait in Serve's proxies.
        sticky: keep requests with the same `x-session-id` header together.
    """

    arguments: Sequence[str]
    name: str = "marith"
    replicas: int = 1
    autoscale: tuple[int, int] | None = None
    cpus: float = 1
    gpus: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    drain_seconds: float = 120
    max_ongoing: int = 256
    sticky: bool = False


def configuration(asked: Asked) -> dict[str, Any]:
    """The Serve configuration: plain data, valid for `ServeDeploySchema`.

    Raises:
        DeploymentError: a mistake in the arguments, the settings or the presets.
    """
    arguments = list(asked.arguments)
    args = parse(arguments)
    if not {ALIAS, PROCESSOR} & set(args.logits_processors or ()):
        if args.logits_processors:
            raise DeploymentError(f"name '{ALIAS}' among the --logits-processors, too")
        arguments += ["--logits-processors", ALIAS]
    try:
        settings = settings_of(args)
        check_names(settings.load_presets(), args.served_model_name or [args.model])
        contents = preset_files.read(settings.presets)
    except (ValueError, PresetError) as error:
        raise DeploymentError(str(error)) from None
    application: dict[str, Any] = {
        "name": asked.name,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {"arguments": without_presets(arguments)},
        "deployments": [_deployment(asked, args, contents)],
    }
    if asked.environment:
        application["runtime_env"] = {"env_vars": dict(asked.environment)}
    listening = {"host": args.host or "0.0.0.0", "port": args.port}
    return checked({"http_options": listening, "applications": [application]})


def _deployment(asked: Asked, args: Any, contents: Mapping[str, str]) -> dict[str, Any]:
    ranks = args.tensor_parallel_size * args.pipeline_parallel_size
    deployment: dict[str, Any] = {
        "name": DEPLOYMENT,
        "max_ongoing_requests": asked.max_ongoing,
        "graceful_shutdown_wait_loop_s": 1.0,
        "graceful_shutdown_timeout_s": asked.drain_seconds,
        "health_check_period_s": _HEALTH_SECONDS,
        "user_config": {"presets": dict(contents)},
    }
    if asked.autoscale is None:
        deployment["num_replicas"] = asked.replicas
    else:
        least, most = asked.autoscale
        deployment["autoscaling_config"] = {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": _BUSY_SHARE * asked.max_ongoing,
        }
    if args.distributed_executor_backend == "ray":
        # The replica asks for no GPU itself: vLLM's workers are actors of their own in the same group.
        deployment["ray_actor_options"] = {"num_cpus": asked.cpus, "num_gpus": 0}
        first, *rest = [{"GPU": 1.0} for _ in range(ranks)]
        deployment["placement_group_bundles"] = [{"CPU": float(asked.cpus), **first}, *rest]
        deployment["placement_group_strategy"] = "PACK"
    else:
        gpus = (0 if _on_cpus() else ranks) if asked.gpus is None else asked.gpus
        deployment["ray_actor_options"] = {"num_cpus": asked.cpus, "num_gpus": gpus}
    if asked.sticky:
        deployment["request_router_config"] = {"request_router_class": STICKY}
    return deployment


def _on_cpus() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, once Serve's own schema has found nothing wrong with it.

    Raises:
        DeploymentError: what is wrong first.
    """
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DeploymentError(f"Serve refuses {place}: {first['msg']}") from None
    return dict(config)


def to_yaml(config: Mapping[str, Any]) -> str:
    """The configuration as `serve deploy` reads it; texts of several lines stay readable."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


@dataclass(frozen=True)
class State:
    """How far a deployment has come.

    Attributes:
        status: Serve's word for the application: DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, ...
        running: replicas that answer.
        wanted: replicas that there should be.
        message: Serve's explanation, if it has one.
        url: where the proxies listen.
    """

    status: str
    running: int
    wanted: int
    message: str
    url: str


class Cluster:
    """A Ray cluster by the address of its dashboard.

    Raises:
        DeploymentError: no cluster answers there.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        if urlsplit(self.address).scheme not in ("http", "https"):
            raise DeploymentError(
                "--ray-address is the address of the cluster's dashboard, such as http://HOST:8265, "
                f"and not {address}"
            )
        try:
            self._client = ServeSubmissionClient(self.address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DeploymentError(
                f"no Ray cluster answers at {self.address} ({_first_line(error)}); `ray start --head` starts "
                "one on this machine, --ray-address names another's dashboard"
            ) from None

    def apply(self, config: Mapping[str, Any]) -> None:
        """Deploys the configuration's applications beside those of other names.

        Raises:
            DeploymentError: Serve refuses it.
        """
        names = {application["name"] for application in config["applications"]}
        others = [
            found["deployed_app_config"]
            for name, found in self._details()["applications"].items()
            if name not in names and found.get("deployed_app_config")
        ]
        whole = {**config, "applications": [*others, *config["applications"]]}
        try:
            self._client.deploy_applications(checked(whole))
        except (RuntimeError, ConnectionError) as error:
            raise DeploymentError(f"the cluster refuses it: {_first_line(error)}") from None

    def state(self, name: str) -> State:
        """Of the application `name`."""
        details = self._details()
        found = details["applications"].get(name)
        if found is None:
            return State("NOT_STARTED", 0, 0, "", "")
        deployment = found.get("deployments", {}).get(DEPLOYMENT, {})
        replicas = deployment.get("replicas", [])
        running = sum(replica["state"] == "RUNNING" for replica in replicas)
        message = deployment.get("message") or found.get("message") or ""
        return State(
            found["status"], running, deployment.get("target_num_replicas", 0), message, self._url(details)
        )

    def wait(self, name: str, seconds: float, tell: Callable[[State], None]) -> State:
        """The application's state once it runs; every change on the way is told.

        Raises:
            DeploymentError: it failed, or does not run after so many seconds.
        """
        deadline = time.monotonic() + seconds
        last: State | None = None
        while True:
            state = self.state(name)
            if (last is None) or (state.status, state.running) != (last.status, last.running):
                tell(state)
            last = state
            if state.status == "RUNNING" and state.running >= state.wanted:
                return state
            if state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise DeploymentError(f"'{name}' is {state.status}: {_reason(state.message)}")
            if time.monotonic() > deadline:
                raise DeploymentError(
                    f"'{name}' is still {state.status} after {seconds:g} s, with {state.running} of "
                    f"{state.wanted} replicas; `serve status --address {self.address}` tells more"
                )
            time.sleep(_POLL_SECONDS)

    def _details(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._client.get_serve_details()
        except (RuntimeError, ConnectionError) as error:
            raise DeploymentError(f"the cluster does not answer: {_first_line(error)}") from None
        return found

    def _url(self, details: Mapping[str, Any]) -> str:
        options = details.get("http_options") or {}
        host = options.get("host") or "127.0.0.1"
        if host in ("0.0.0.0", "::"):
            host = urlsplit(self.address).hostname or "127.0.0.1"
        return f"http://{host}:{options.get('port', 8000)}"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _reason(message: str) -> str:
    """The last line of a traceback that has anything to say, or the whole message."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return errors[-1] if errors else " ".join(lines) or "Serve gives no reason"
