"""vLLM's configuration of each constituent, and what is refused at the start."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from vllm.config import ModelConfig, VllmConfig
from vllm.config import replace as replace_config
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from ..group import KEY
from .memory import Blocks

if TYPE_CHECKING:
    from ..settings import ConstituentSettings, Settings

logger = init_logger("vllm.marith")  # within vLLM's, whose level and handlers the operator sets

LOAD_FORMAT = "marith_constituents"
"""The load format under which `engine.worker.constituents` loads all constituents."""

_THEIR_FORMAT = "marith_load_format"
"""Key of ``model_loader_extra_config`` that holds the load format of each single constituent."""


def prepare(config: VllmConfig, settings: Settings) -> None:
    """Makes a configuration one of several constituents.

    Writes into it how the models are loaded, the block sizes, and that no CUDA graph spans the models.

    Raises:
        ValueError: a constituent, or an option beside it, that cannot be served; one sentence.
    """
    _check_options(config)
    models = [config.model_config]
    for name, constituent in settings.constituents.items():
        try:
            model = model_config(config, constituent)
            _check_model(model)
            _check_vocabulary(config.model_config, model)
        except ValueError as error:
            raise ValueError(f"constituent '{name}': {_sentence(error)}") from None
        models.append(model)
    _check_model(config.model_config)

    token_bytes = [_token_bytes(config, model) for model in models]
    cache = config.cache_config
    blocks = Blocks.choose(token_bytes, cache.block_size, _unit(cache.block_size))
    if settings.block_sizes:
        if len(settings.block_sizes) != len(models):
            raise ValueError(
                f"block_sizes needs a number for the base model and one for each constituent, {len(models)} "
                f"in all, not {len(settings.block_sizes)}"
            )
        blocks = Blocks.of_sizes(settings.block_sizes, token_bytes)
    additional = config.additional_config
    assert isinstance(additional, dict)  # the settings came from it
    own = {**additional[KEY], "block_sizes": list(blocks.sizes)}
    config.additional_config = {**additional, KEY: own}

    load = config.load_config
    extra = {**load.model_loader_extra_config, _THEIR_FORMAT: load.load_format}
    config.load_config = replace_config(load, load_format=LOAD_FORMAT, model_loader_extra_config=extra)
    compilation = config.compilation_config
    if compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE):
        logger.info("marith: CUDA graphs are off: with several constituents, one graph cannot span a step")
        compilation.cudagraph_mode = CUDAGraphMode.NONE


def model_config(config: VllmConfig, constituent: ConstituentSettings) -> ModelConfig:
    """A constituent's `ModelConfig`: the base model's options, but its own weights and quantisation.

    Raises:
        ValueError: the model does not exist or cannot be run; vLLM's own words.
    """
    base = config.model_config
    dtype: Any = constituent.dtype or base.dtype
    try:
        return ModelConfig(
            model=constituent.path,
            revision=constituent.revision,
            dtype=dtype,
            quantization=constituent.quantization,
            max_model_len=base.max_model_len,
            seed=base.seed,
            trust_remote_code=base.trust_remote_code,
            enforce_eager=base.enforce_eager,
            generation_config="vllm",
        )
    except OSError as error:
        raise ValueError(f"'{constituent.path}' cannot be read: {_sentence(error)}") from None


def vllm_configs(config: VllmConfig, settings: Settings) -> list[VllmConfig]:
    """The configuration that each constituent is made with, the base model's first.

    Caches, layers' registry and parallelism are shared; the model and its quantisation are its own.
    """
    load = config.load_config
    extra = dict(load.model_loader_extra_config)
    single = replace_config(load, load_format=extra.pop(_THEIR_FORMAT), model_loader_extra_config=extra)
    base = copy.copy(config)
    base.load_config = single
    configs = [base]
    for constituent in settings.constituents.values():
        own = copy.copy(base)
        own.model_config = model_config(config, constituent)
        own.quant_config = VllmConfig.get_quantization_config(own.model_config, single)
        lora = config.lora_config
        if lora is not None and lora.lora_dtype == config.model_config.dtype:  # by default the model's
            own.lora_config = replace_config(lora, lora_dtype=own.model_config.dtype)
        configs.append(own)
    return configs


def _check_options(config: VllmConfig) -> None:
    parallel = config.parallel_config
    for refused, what in (
        (parallel.data_parallel_size > 1, "--data-parallel-size above 1"),
        (config.cache_config.cache_dtype not in _CACHE_DTYPES, "this --kv-cache-dtype"),
        (config.model_config.enable_prompt_embeds, "--enable-prompt-embeds"),
        (config.cache_config.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill"),
        (config.model_config.enable_sleep_mode, "--enable-sleep-mode"),
        (
            config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE,
            "compilation of the whole model (mode 1)",
        ),
    ):
        if refused:
            raise ValueError(f"{what} cannot be combined with constituents")


_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


def _check_model(model: ModelConfig) -> None:
    for refused, what in (
        (model.runner_type != "generate", "a model that does not generate text"),
        (model.is_encoder_decoder, "an encoder-decoder model"),
        (model.is_hybrid or model.is_attention_free, "a model with Mamba layers"),
        (model.use_mla, "a model with MLA"),
        (model.get_sliding_window() is not None, "a model with sliding-window attention"),
        (model.attention_chunk_size is not None, "a model with chunked local attention"),
        (model.is_multimodal_model, "a multimodal model"),
        (model.uses_mrope, "a model with M-RoPE"),
    ):
        if refused:
            raise ValueError(f"{what} cannot be one of several constituents")


def _check_vocabulary(base: ModelConfig, other: ModelConfig) -> None:
    """Raises ValueError unless both models read and write the same tokens under the same numbers.

    Compared is what a token's number stands for.  The text is tokenized by the base model's tokenizer, once.
    Models of one family are padded to different sizes; what is padding in one must be no token in either.
    """
    sizes = base.get_vocab_size(), other.get_vocab_size()
    ours, theirs = (cached_tokenizer_from_config(model) for model in (base, other))
    if ours is None or theirs is None:
        return
    mine, its = ({i: t for t, i in tokenizer.get_vocab().items()} for tokenizer in (ours, theirs))
    for i in range(max(sizes)):
        if mine.get(i) != its.get(i):
            here, there = _shown(its, i), _shown(mine, i)
            raise ValueError(f"its vocabulary is another: token {i} is {here}, in the base model's {there}")
        if i >= min(sizes) and i in mine:
            raise ValueError(
                f"its vocabulary is another: it has logits for {sizes[1]} tokens, the base model for "
                f"{sizes[0]}, and token {i} is {_shown(mine, i)}"
            )


def _shown(vocabulary: dict[int, str], i: int) -> str:
    return repr(vocabulary[i]) if i in vocabulary else "missing"


def _token_bytes(config: VllmConfig, model: ModelConfig) -> int:
    """Bytes of the keys and values of one token in all layers, on one tensor-parallel rank."""
    parallel = config.parallel_config
    element = kv_cache_dtype_str_to_dtype(config.cache_config.cache_dtype, model).itemsize
    heads = model.get_num_kv_heads(parallel)
    return 2 * model.get_num_layers(parallel) * heads * model.get_head_size() * element


def _unit(block_size: int) -> int:
    """Every attention kernel that takes blocks of `block_size` takes blocks of a multiple of this."""
    return next((unit for unit in (32, 16) if block_size % unit == 0), block_size)


def _sentence(error: Exception) -> str:
    """vLLM's and pydantic's reasons without what surrounds them."""
    errors: Any = getattr(error, "errors", None)
    text = errors(include_url=False)[0]["msg"] if callable(errors) else str(error)
    return text.removeprefix("Value error, ").strip().split("\n")[0]
