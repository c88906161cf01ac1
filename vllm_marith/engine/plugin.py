"""How the plugin gets into vLLM, and when it refuses to.

`register` is the ``vllm.general_plugins`` entry point: vLLM calls it in the frontend, the engine
core and every worker.  It wraps one function and does nothing else.  Only when ``marith`` is named
among the logits processors does `enable` go further; without that name a vLLM with this package
installed behaves like one without it.

What is switched on where:

- frontend: `enable` wraps the renderers and the input processor (see `frontend`), and in a server adds
  presets as models, routes and metrics (see `vllm_marith.serving`);
- engine core: the scheduler class is the one that `enable` wrote into the configuration (`core`);
- worker: vLLM constructs `FormulaLogitsProcessor` there, which wraps the V1 model runner; for V2, the
  worker extension that `enable` wrote into the configuration acts before the model is loaded (`worker`).
"""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from . import patches

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ALIAS = "marith"
PROCESSOR = "vllm_marith.engine.processor:FormulaLogitsProcessor"


class UnsupportedError(ValueError):
    """This vLLM, or this way of running it, cannot serve formulas; the sentence says why."""


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; idempotent."""

    def wrap(create_engine_config: Any) -> Any:
        @functools.wraps(create_engine_config)
        def with_formulas(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
            named = [ALIAS, PROCESSOR]
            processors = list(self.logits_processors or [])
            if not any(p in named for p in processors):
                return create_engine_config(self, *args, **kwargs)
            from . import speculation

            try:
                check_version()
                patches.shield_llvmlite()
                self.logits_processors = [PROCESSOR if p in named else p for p in processors]
                try:
                    with speculation.configured(self):
                        config = create_engine_config(self, *args, **kwargs)
                except speculation.ConfigurationError as error:
                    raise UnsupportedError(str(error)) from None
                enable(config)
                if _is_server(args, kwargs):
                    _enable_serving(config, self.served_model_name or [self.model])
            except UnsupportedError as error:
                if _is_server(args, kwargs):
                    # One sentence for the operator; a traceback of vLLM's start says nothing more.
                    raise SystemExit(f"marith: {error}") from None
                raise
            return config

        return with_formulas

    patches.patch("vllm.engine.arg_utils:EngineArgs.create_engine_config", wrap)


def enable(config: VllmConfig) -> None:
    """Checks a configuration that names ``marith`` and makes it schedule groups.

    Raises:
        UnsupportedError: an option that formulas cannot be served with, a wrong setting, a wrong preset
            file, or a classifier that cannot be used.
    """
    from . import speculation
    from .classifiers import read_cards
    from .settings import Settings

    speculation.mark(config)
    check_options(config)
    _check_ledger("v2" if config.use_v2_model_runner else "v1")
    try:
        settings = Settings.of(config)
        settings.load_presets()
        read_cards(settings.classifiers)
        if settings.constituents:
            from .constituents.config import prepare

            prepare(config, settings)
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    if settings.classifiers and config.model_config.skip_tokenizer_init:
        raise UnsupportedError("--skip-tokenizer-init cannot be combined with classifiers, which read text")

    scheduler = config.scheduler_config
    base = scheduler.get_scheduler_cls()
    scheduler.scheduler_cls = _SCHEDULERS[f"{base.__module__}.{base.__qualname__}"]

    from .frontend import hooks
    from .worker import extension

    # Whichever runner this process would choose: workers decide for themselves.
    parallel = config.parallel_config
    parallel.worker_extension_cls = extension.name_over(
        parallel.worker_extension_cls, constituents=bool(settings.constituents)
    )
    hooks.install()
    if _uses_ray(config):
        _check_ledger("ray")
        from vllm_marith.distributed import executor

        executor.install(config)


def _enable_serving(config: VllmConfig, served: str | list[str]) -> None:
    """Presets as models, routes and metrics of an API server.

    Raises:
        UnsupportedError: a preset has the name of a served model.
    """
    from vllm_marith.serving import plugin as serving

    from .settings import Settings

    try:
        serving.check_names(
            Settings.of(config).load_presets(), [served] if isinstance(served, str) else served
        )
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    serving.install(config)
    if _uses_ray(config):
        from vllm_marith.distributed import executor

        executor.install_in_server()


def _uses_ray(config: VllmConfig) -> bool:
    return config.parallel_config.use_ray or config.parallel_config.data_parallel_backend == "ray"


_CORE = "vllm_marith.engine.core.scheduler."
_SCHEDULERS = {
    "vllm.v1.core.sched.scheduler.Scheduler": _CORE + "GroupScheduler",
    "vllm.v1.core.sched.async_scheduler.AsyncScheduler": _CORE + "AsyncGroupScheduler",
    _CORE + "GroupScheduler": _CORE + "GroupScheduler",
    _CORE + "AsyncGroupScheduler": _CORE + "AsyncGroupScheduler",
}
"""vLLM's scheduler classes and ours over them: the wrong base would lose asynchronous scheduling."""


def check_version() -> None:
    """Raises `UnsupportedError` unless this vLLM is one that the ledger fits."""
    import vllm

    found = Version(vllm.__version__)
    if not SpecifierSet(patches.SUPPORTED, prereleases=True).contains(found.base_version):
        raise UnsupportedError(
            f"this vllm-marith serves formulas with vLLM {patches.SUPPORTED}; installed is {found}"
        )
    _check_ledger()


def _check_ledger(runner: str = "") -> None:
    import vllm

    for sentence in patches.missing(runner):
        raise UnsupportedError(
            f"vLLM {vllm.__version__} differs here from the supported {patches.SUPPORTED}: {sentence}"
        )


def check_options(config: VllmConfig) -> None:
    """Raises `UnsupportedError` for the first engine option that formulas do not work with."""
    from . import speculation

    model, parallel, scheduler = config.model_config, config.parallel_config, config.scheduler_config
    base = scheduler.get_scheduler_cls()
    known = f"{base.__module__}.{base.__qualname__}" in _SCHEDULERS
    for refused, sentence in (
        (model.runner_type != "generate", "formulas need a model that generates text"),
        (model.is_encoder_decoder, "encoder-decoder models cannot serve formulas"),
        (model.is_hybrid or model.is_attention_free, "models with Mamba layers cannot serve formulas yet"),
        (model.is_diffusion, "diffusion models cannot serve formulas"),
        *speculation.refusals(config),
        (parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size must be 1 to serve formulas"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism cannot be combined with formulas",
        ),
        (parallel.enable_dbo, "--enable-dbo (dual-batch overlap) would split a group's rows"),
        (
            bool(parallel.enable_batch_sharded_sampling),
            "--enable-batch-sharded-sampling would split a group's rows",
        ),
        (config.watermark_config is not None, "--watermark-config cannot be combined with formulas"),
        (config.kv_transfer_config is not None, "--kv-transfer-config (KV connectors) cannot serve formulas"),
        (config.ec_transfer_config is not None, "--ec-transfer-config cannot be combined with formulas"),
        (not known, f"--scheduler-cls {base.__qualname__} cannot be combined with formulas"),
    ):
        if refused:
            raise UnsupportedError(sentence)


def environment_report() -> list[tuple[str, bool, str]]:
    """What `marith check` prints: (name, whether it is as needed, one sentence)."""
    report = []
    for name in ("torch", "transformers", "numba", "triton"):
        try:
            report.append((name, True, version(name)))
        except PackageNotFoundError:
            optional = name in ("numba", "triton")
            report.append((name, optional, "not installed" + (" (optional)" if optional else "")))
    try:
        import_module("vllm")
    except ImportError as error:
        report.append(("vllm", False, f"cannot be imported: {error}"))
        return report
    try:
        check_version()
        report.append(("vllm", True, f"within the supported range {patches.SUPPORTED}"))
    except UnsupportedError as error:
        report.append(("vllm", False, str(error)))
    return report


def _is_server(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    usage = kwargs.get("usage_context", args[0] if args else None)
    return getattr(usage, "value", None) == "OPENAI_API_SERVER"
