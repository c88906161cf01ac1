"""The commands for clusters: `marith deploy` and `marith plan`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vllm_marith.distributed.errors import DeploymentError
from vllm_marith.language import Formula, Presets, parse_request

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What a command does not know goes on to vLLM."""


def deploy(
    arguments: Annotated[
        list[str], typer.Argument(metavar="MODEL [VLLM SERVE ARGS]...", help="As behind `vllm serve`.")
    ],
    replicas: Annotated[
        int, typer.Option(min=1, help="Engines, each with its own weights and KV cache.")
    ] = 1,
    autoscale: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="As many replicas as the load asks for, instead.")
    ] = None,
    ray_address: Annotated[
        str,
        typer.Option(
            envvar="RAY_DASHBOARD_ADDRESS", show_envvar=True, help="The dashboard of the cluster's head node."
        ),
    ] = "http://127.0.0.1:8265",
    name: Annotated[str, typer.Option(help="Of the Serve application.")] = "marith",
    cpus: Annotated[float, typer.Option(min=0, help="Set aside for a replica.")] = 1,
    gpus: Annotated[
        float | None,
        typer.Option(
            min=0, help="Set aside for a replica (default: one a rank; none where vLLM is its CPU build)."
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An environment variable of the replicas.  Repeatable."),
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds that a replica may take to finish what it has accepted.")
    ] = 120,
    max_ongoing: Annotated[
        int, typer.Option(min=1, help="Requests that a replica is given at a time; more wait in Serve.")
    ] = 256,
    sticky: Annotated[
        bool, typer.Option("--sticky", help="Keep requests with the same x-session-id header on one replica.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print Serve's configuration; apply nothing.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write it there, for `serve deploy` or KubeRay; apply nothing.")
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until it runs; 0: do not.")] = 1200,
) -> None:
    """Serve a model's formulas from several engines of a Ray cluster, behind one address.

    The preset files of the settings travel with the deployment.  The same command again, with other presets,
    exchanges those without a restart; with other arguments, it replaces the replicas one by one, and each
    first finishes what it has accepted.
    """
    for package, extra in (("ray", "ray"), ("vllm", "cpu]' or 'vllm-marith[cuda")):
        if find_spec(package) is None:
            raise DeploymentError(
                f"a deployment needs {package}; pip install 'vllm-marith[{extra}]' brings it"
            )
    from vllm_marith.distributed.deploy import Asked, Cluster, State, configuration, to_yaml

    asked = Asked(
        arguments=arguments,
        name=name,
        replicas=replicas,
        autoscale=_range(autoscale) if autoscale is not None else None,
        cpus=cpus,
        gpus=gpus,
        environment=_environment(env or []),
        drain_seconds=drain,
        max_ongoing=max_ongoing,
        sticky=sticky,
    )
    config = configuration(asked)
    if output is not None:
        try:
            output.write_text(to_yaml(config), encoding="utf-8")
        except OSError as error:
            raise DeploymentError(f"{output} cannot be written: {error.strerror}") from None
    if dry_run:
        print(to_yaml(config), end="")
    if dry_run or output is not None:
        return
    cluster = Cluster(ray_address)
    cluster.apply(config)
    address = f"--address {cluster.address}"
    if wait == 0:
        print(f"'{name}' is on its way; `serve status {address}` tells how far")
        return

    def tell(state: State) -> None:
        print(f"{state.status.lower()}: {state.running} of {state.wanted} replicas", flush=True)

    state = cluster.wait(name, wait, tell)
    port = config["http_options"]["port"]
    if not state.url.endswith(f":{port}"):
        print(f"\nnot at port {port}: Serve was started with another, and keeps it until it is shut down")
    print(
        f"\n'{name}' answers at {state.url}/v1, its page at {state.url}/marith/\n"
        f"  status  serve status {address}\n"
        f"  change  the same command again; replicas finish what they have accepted, for up to {drain:g} s\n"
        f"  end     serve shutdown -y {address}    (all applications of the cluster)"
    )


def _range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal() and int(least) <= int(most) and int(most) > 0):
        raise DeploymentError("--autoscale is MIN:MAX, such as 1:4")
    return int(least), int(most)


def _environment(values: list[str]) -> dict[str, str]:
    found = dict(value.partition("=")[::2] for value in values)
    if "" in found or any("=" not in value for value in values):
        raise DeploymentError("--env is NAME=VALUE")
    return found


def plan(
    model: Annotated[str, typer.Option(help="Directory or name on the hub; only its configuration is read.")],
    gpus: Annotated[int, typer.Option(min=1, help="Of the whole cluster.")],
    qps: Annotated[float, typer.Option(min=0, help="Requests a second that are to be served.")],
    preset: Annotated[
        str, typer.Option(help="A preset's name or its file, or a formula; its members are what costs.")
    ] = "base",
    presets: Annotated[list[Path] | None, typer.Option(help="A folder of presets.  Repeatable.")] = None,
    constituent: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="A further model of the formula's.  Repeatable."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Whose datasheet: L4, L40S, A100-40GB, A100-80GB, H100 or H200.")
    ] = "H100",
    memory: Annotated[float | None, typer.Option(help="Of another device, in GB;")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="its GB a second;")] = None,
    tflops: Annotated[float | None, typer.Option(help="its 10^12 operations a second.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each member's prompt.")] = 512,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256,
    dtype: Annotated[str, typer.Option(help="As vLLM's --dtype.")] = "auto",
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the datasheet's figures that is reached.")
    ] = 0.6,
    memory_share: Annotated[
        float, typer.Option(min=0.1, max=1, help="vLLM's --gpu-memory-utilization.")
    ] = 0.9,
    activations: Annotated[float, typer.Option(min=0, help="GB that are neither weights nor KV cache.")] = 4,
    overhead: Annotated[float, typer.Option(min=0, help="Milliseconds of every step.")] = 2,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="vLLM's --max-num-seqs.")] = 256,
) -> None:
    """Estimate, on paper, what a cluster carries: engines, groups at a time, requests a second.

    Nothing is measured: the figures of a datasheet, an efficiency that is an assumption, and arithmetic.
    """
    if find_spec("vllm") is None:
        raise DeploymentError("it reads models as vLLM does; pip install 'vllm-marith[cpu]' brings it")
    from vllm_marith.distributed import capacity
    from vllm_marith.distributed.capacity import GB, Assumptions, Device, Load
    from vllm_marith.distributed.model_facts import members_of, model_facts
    from vllm_marith.distributed.plan_report import report

    own = (memory, bandwidth, tflops)
    if any(value is not None for value in own):
        if None in own or min(value or 0 for value in own) <= 0:
            raise DeploymentError("a device of your own needs --memory, --bandwidth and --tflops")
        gpu = Device("own", (memory or 0) * GB, (bandwidth or 0) * GB, (tflops or 0) * 1e12)
    elif device in capacity.DEVICES:
        gpu = capacity.DEVICES[device]
    else:
        known = ", ".join(capacity.DEVICES)
        raise DeploymentError(
            f"no datasheet of '{device}' here ({known}); --memory, --bandwidth and --tflops name its figures"
        )
    formula = _formula(preset, presets or [])
    named = dict(value.partition("=")[::2] for value in constituent or [])
    if not all(named.values()):
        raise DeploymentError("--constituent is NAME=MODEL")
    members = members_of(
        formula, model_facts(model, dtype), {name: model_facts(path, dtype) for name, path in named.items()}
    )
    given = Assumptions(efficiency, memory_share, activations * GB, overhead / 1000, max_num_seqs)
    load = Load(qps, prompt, answer)
    print(report(str(formula), members, gpu, gpus, load, given))


def _formula(preset: str, folders: list[Path]) -> Formula:
    if preset.endswith((".yaml", ".yml")):
        found = Presets.load(preset, *folders).formulas
        name = Path(preset).stem
        if name not in found:
            raise DeploymentError(f"{preset} defines no preset '{name}'")
        return found[name]
    loaded = Presets.load(*folders)
    if preset in loaded.formulas:
        return loaded.formulas[preset]
    if folders or preset.lstrip().startswith("{"):
        return parse_request(preset, presets=loaded)
    return Formula.parse(preset).check()
