"""What `marith plan` prints: the suggestion, the table behind it, and every assumption."""

from __future__ import annotations

from collections.abc import Sequence

from .capacity import GB, Assumptions, Device, Load, Model, plans, suggested


def report(
    formula: str, members: Sequence[Model], device: Device, gpus: int, load: Load, given: Assumptions
) -> str:
    """The plan for `gpus` devices as text.

    Raises:
        DeploymentError: the models do not fit.
    """
    found = plans(members, device, gpus, load, given)
    best = suggested(found, load)
    models = {model.name: model for model in members}.values()
    if best.low >= load.qps:
        verdict = "carried, also at the low end"
    elif best.qps >= load.qps:
        verdict = "carried if the assumptions hold, not at the low end"
    else:
        verdict = "not carried"
    rows = [
        (
            "engines",
            "tensor parallel",
            "groups in KV",
            "rows allow",
            "step, ms",
            "tokens/s",
            "requests/s",
            "bottleneck",
        )
    ]
    for plan in found:
        engine = plan.engine
        rows.append(
            (
                f"{plan.replicas}{' *' if plan is best else ''}",
                str(engine.ranks),
                str(engine.kv_groups),
                str(engine.row_groups),
                f"{engine.step * 1000:.1f}",
                f"{plan.tokens:.0f}",
                f"{plan.qps:.2f} ({plan.low:.2f} to {plan.high:.2f})",
                engine.bottleneck,
            )
        )
    lines = [
        f"formula     {formula}: {len(members)} members",
        f"load        {load.qps:g} requests a second, {load.prompt} tokens a prompt, {load.answer} an answer",
        f"suggested   {best.replicas} x vllm serve --tensor-parallel-size {best.engine.ranks}, "
        f"{best.engine.groups} groups at a time in each",
        f"carries     {best.qps:.2f} requests a second ({best.low:.2f} to {best.high:.2f}): "
        f"{load.qps:g} are {verdict}",
        f"limited by  {best.engine.bottleneck}",
        "",
        *_columns(rows),
        "",
        "Assumed, not measured:",
        f"  {device.name}: {device.memory / GB:g} GB, {device.bandwidth / GB:g} GB/s, "
        f"{device.arithmetic / 1e12:g} TFLOPS (16 bits, dense), from its datasheet",
        f"  efficiency {given.efficiency:g} of both; the range is a third less and more, a guess",
        f"  vLLM takes {given.memory_share:g} of the memory, {given.activations / GB:g} GB of it for neither "
        "weights nor KV",
        f"  {given.overhead * 1000:g} ms of every step are none of the model's",
        f"  a step has at most {given.max_num_seqs} rows",
        "  tensor parallelism and the network between nodes cost nothing; requests come evenly",
        "  no prompt is in the prefix cache, though terms' own prompts mostly are",
        "Computed from configurations:",
        *(
            f"  {model.name}: {model.weight_bytes / GB:.3g} GB of weights, "
            f"{model.token_bytes} bytes of KV cache a token"
            for model in models
        ),
    ]
    return "\n".join(lines)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
