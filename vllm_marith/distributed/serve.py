"""The Serve application: ``import_path: vllm_marith.distributed.serve:build``.

    applications:
    - name: marith
      import_path: vllm_marith.distributed.serve:build
      args: {arguments: [MODEL, --logits-processor, marith]}
      deployments:
      - {name: vllm, num_replicas: 2, user_config: {presets: {"steer.yaml": "formula: ..."}}}

`marith deploy` writes such a configuration and applies it; see `vllm_marith.distributed.deploy`.
"""

# Annotations are evaluated here: Serve makes the builder's argument from its annotation.

from pydantic import BaseModel, ConfigDict
from ray import serve

from .arguments import parse
from .replica import Replica

DEPLOYMENT = "vllm"

_ATTEMPTS = 3
"""To start a replica, before Serve calls the deployment failed: a wrong setting is wrong every time."""


class Arguments(BaseModel):
    """What `args` of the application holds.

    Attributes:
        arguments: as they stand behind `vllm serve`, the model first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arguments: list[str]


def build(args: Arguments) -> serve.Application:
    """One deployment, `vllm`, whose replicas are engines with vLLM's HTTP application.

    Raises:
        DeploymentError: the arguments are none that a replica can be started with.
    """
    parse(args.arguments)
    deployment = serve.deployment(name=DEPLOYMENT, max_constructor_retry_count=_ATTEMPTS)(
        serve.ingress()(Replica)
    )
    return deployment.bind(args.arguments)
