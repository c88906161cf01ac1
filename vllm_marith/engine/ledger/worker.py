"""The ledger's entries of worker processes, for the V1 model runner and for both."""

from __future__ import annotations

from .entry import Entry

_V1_API = "a logits hook ahead of the grammar mask"
_V2 = "vllm.v1.worker.gpu"
_TEXT_API = "a logits hook that is told the tokens so far"
_FAILURE_API = "an error of one request in ModelRunnerOutput"

ENTRIES: tuple[Entry, ...] = (
    *(
        Entry(
            f"vllm.lora.{module}:{product}",
            "on CPUs a row without an adapter, index -1, is computed with the adapter in the last slot",
            "wraps",
            "vLLM's torch LoRA products skipping the index -1, as its Triton kernels do",
            ("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor"),
        )
        for module in ("ops.torch_ops.lora_ops", "punica_wrapper.punica_cpu")
        for product in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
    ),
    Entry(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
        "fusion must come before the grammar mask, penalties and raw log-probabilities",
        "wraps",
        _V1_API,
        ("self", "grammar_output"),
        runner="v1",
        calls=("apply_grammar_bitmask", "_sample"),
    ),
    Entry(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
        "followers receive their leader's token before anything reads it",
        "wraps",
        "a hook on the sampled token ids",
        ("self", "logits", "spec_decode_metadata"),
        runner="v1",
    ),
    Entry(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict",
        "log-probabilities of a prompt are the formula's, and need all members' hidden states",
        "wraps",
        "a hook on the hidden states of prompt tokens",
        ("self", "hidden_states", "num_scheduled_tokens"),
        runner="v1",
    ),
    Entry(
        "vllm.v1.worker.gpu_model_runner:ExecuteModelState",
        "fused logits take the place of the step's own",
        "reads",
        _V1_API,
        ("logits",),
        runner="v1",
    ),
    *(
        Entry(
            target,
            "which request sits in which row, and whether it is held",
            "reads",
            _V1_API,
            (),
            "v1",
            attributes=names,
        )
        for target, names in (
            (
                "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
                (
                    "execute_model_state",
                    "input_batch",
                    "discard_request_mask",
                    "optimistic_seq_lens_cpu",
                    "num_prompt_logprobs",
                    "query_start_loc",
                    "requests",
                    "device",
                ),
            ),
            (
                "vllm.v1.worker.gpu_input_batch:InputBatch",
                ("req_ids", "req_id_to_index", "generators", "logitsprocs"),
            ),
        )
    ),
    *(
        Entry(target, "classifiers read the answer so far", "reads", _TEXT_API, (), runner, attributes=names)
        for target, runner, names in (
            (
                "vllm.v1.worker.gpu_input_batch:CachedRequestState",
                "v1",
                ("prompt_token_ids", "output_token_ids"),
            ),
            (
                "vllm.v1.worker.gpu_input_batch:InputBatch",
                "v1",
                ("prev_sampled_token_ids", "prev_req_id_to_index"),
            ),
            (f"{_V2}.states:RequestState", "v2", ("req_id_to_index", "all_token_ids", "prompt_len")),
        )
    ),
    Entry(
        "vllm.tokenizers.registry:cached_tokenizer_from_config",
        "candidates of classifiers are texts",
        "reads",
        _TEXT_API,
        ("model_config",),
    ),
    Entry(
        f"{_V2}.model_runner:GPUModelRunner.sample_tokens",
        "groups that could not be computed are reported with the step's output",
        "wraps",
        _FAILURE_API,
        ("self", "grammar_output"),
        runner="v2",
    ),
    *(
        Entry(
            target,
            "asynchronous output carries what the scheduler gets in the end",
            "reads",
            _FAILURE_API,
            runner=runner,
            attributes=(name,),
        )
        for target, runner, name in (
            ("vllm.v1.worker.gpu_model_runner:AsyncGPUModelRunnerOutput", "v1", "_model_runner_output"),
            (f"{_V2}.async_utils:AsyncOutput", "v2", "model_runner_output"),
        )
    ),
    *(
        Entry(
            f"{module}:GPUModelRunner._init_kv_zero_meta",
            "blocks that hold NaN are zeroed, for which vLLM prepares for some models only",
            "reads",
            _FAILURE_API,
            ("self",),
            runner=runner,
        )
        for module, runner in (("vllm.v1.worker.gpu_model_runner", "v1"), (f"{_V2}.model_runner", "v2"))
    ),
)
