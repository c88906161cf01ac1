"""The command line of `vllm serve`, read by vLLM's own parser, for an engine inside a Serve replica.

A replica takes the same arguments as `vllm serve MODEL ...`.  What is another's business there is refused
with a sentence: sockets and TLS are Serve's proxies', and several servers or data-parallel ranks are what
replicas are for.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_marith.engine.group import KEY
from vllm_marith.engine.settings import Settings

from .errors import DeploymentError

LISTENING = {"host": "--host", "port": "--port"}
"""Given to Serve's proxies by whoever writes the deployment's configuration; a replica does not listen."""

_REFUSED = {
    "headless": "a replica is a server",
    "grpc": "the deployment serves HTTP",
    "grpc_port": "the deployment serves HTTP",
    "uds": "Serve's proxies listen on a port",
    "ssl_keyfile": "TLS is Serve's: ssl_keyfile under http_options",
    "ssl_certfile": "TLS is Serve's: ssl_certfile under http_options",
    "ssl_ca_certs": "TLS is Serve's: ssl_ca_certs under http_options",
    "root_path": "Serve sets the root path",
    "config": "it names a file of one machine; write its options out",
}


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DeploymentError(f"vllm serve: {message}")


def parse(arguments: Sequence[str]) -> Namespace:
    """What `vllm serve` makes of these arguments.

    Args:
        arguments: as they stand behind `vllm serve`, the model first.

    Raises:
        DeploymentError: vLLM refuses them, or they make no sense in a replica.
    """
    command = ServeSubcommand()
    parser = _Parser(prog="vllm")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    try:
        args = parser.parse_args(["serve", *arguments])
        command.validate(args)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, DeploymentError):
            raise
        raise DeploymentError(f"vllm serve: {error}") from None
    except SystemExit:  # `--help` and the like
        raise DeploymentError("the arguments of `vllm serve` are told by `vllm serve --help`") from None
    for name, reason in _REFUSED.items():
        if getattr(args, name, None):
            raise DeploymentError(f"--{name.replace('_', '-')} has no place in a deployment: {reason}")
    if args.model_tag is not None:
        args.model = args.model_tag
    elif not any(argument.startswith("--model") for argument in arguments):
        raise DeploymentError("the model is missing: its name or path comes first, as in `vllm serve MODEL`")
    if (args.api_server_count or 1) > 1 or args.data_parallel_size > 1:
        raise DeploymentError(
            "--api-server-count and --data-parallel-size have no place in a deployment: ask for more replicas"
        )
    return args


def settings_of(args: Namespace) -> Settings:
    """This project's settings among the arguments.

    Raises:
        ValueError: a key or value is wrong; the sentence names it.
    """
    return Settings.of(args)


def with_presets(args: Namespace, presets: Sequence[Path]) -> Namespace:
    """The arguments with these in the place of the presets of the settings."""
    additional = dict(args.additional_config or {})
    ours = {key: value for key, value in additional.get(KEY, {}).items() if key != "presets"}
    if presets:
        ours["presets"] = [str(path) for path in presets]
    if ours or KEY in additional:
        additional[KEY] = ours
    return Namespace(**{**vars(args), "additional_config": additional})


def without_presets(arguments: Sequence[str]) -> list[str]:
    """The arguments less the presets of the settings, which travel on their own.

    Raises:
        DeploymentError: `--additional-config` is written in a way that cannot be taken apart.
    """
    before = parse(arguments)
    if not settings_of(before).presets:
        return list(arguments)
    wanted = with_presets(before, ())
    kept, skip = [], False
    for argument in arguments:
        option = argument.partition("=")[0].partition(".")[0].replace("_", "-")
        if skip or option == "--additional-config":
            skip = not skip and "=" not in argument
            continue
        kept.append(argument)
    if rest := _filled(wanted.additional_config):
        kept += ["--additional-config", json.dumps(rest)]
    after = parse(kept)
    if {**vars(after), "additional_config": None} != {**vars(before), "additional_config": None}:
        raise DeploymentError("write --additional-config as one JSON object")
    return kept


def _filled(additional: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in additional.items() if value or key != KEY}
