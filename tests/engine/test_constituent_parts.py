"""Parts of an engine with several base models that need no engine: block sizes, and who has which rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_marith.engine.constituents.memory import MAX_WASTE, Blocks, layouts
from vllm_marith.engine.worker.constituents.routing import Router

LLAMA = (32 * 8 * 128 * 2 * 2, 16 * 8 * 64 * 2 * 2)  # 8B and 1B, bytes of a token in bfloat16
QWEN = (28 * 4 * 128 * 2 * 2, 24 * 2 * 64 * 2 * 2)  # 7B and 0.5B


@pytest.mark.parametrize(
    ("token_bytes", "sizes", "waste"),
    [
        (LLAMA, (16, 64), 0.0),
        (QWEN, (16, 64), 0.143),
        (LLAMA[::-1], (64, 16), 0.0),
        ((100,) * 3, (16,) * 3, 0.0),
    ],
)
def test_known_pairs(token_bytes: tuple[int, ...], sizes: tuple[int, ...], waste: float) -> None:
    blocks = Blocks.choose(token_bytes, smallest=16, unit=16)
    assert blocks.sizes == sizes
    assert max(blocks.waste) == pytest.approx(waste, abs=1e-3)


@given(
    st.lists(st.integers(1, 1 << 20), min_size=1, max_size=6),
    st.sampled_from([(16, 16), (32, 32), (128, 32)]),
)
def test_blocks_fit(token_bytes: list[int], sizes: tuple[int, int]) -> None:
    """No block is larger than the largest, sizes are the kernels', and larger blocks are a last resort."""
    smallest, unit = sizes
    blocks = Blocks.choose(token_bytes, smallest, unit)
    used = [size * token for size, token in zip(blocks.sizes, token_bytes, strict=True)]
    assert max(used) == blocks.sizes[int(np.argmax(token_bytes))] * max(token_bytes)
    assert all(size >= smallest and size % unit == 0 for size in blocks.sizes)
    assert blocks.waste == pytest.approx([1 - u / max(used) for u in used])
    # One more unit of tokens would not have fitted.
    assert all(u + unit * token > max(used) for u, token in zip(used, token_bytes, strict=True))
    if min(blocks.sizes) > smallest:
        plain = Blocks.of_sizes(
            [smallest * max(token_bytes) // t // unit * unit for t in token_bytes], token_bytes
        )
        assert max(plain.waste) > MAX_WASTE


def test_layouts() -> None:
    lb = (KVCacheLayout.LBHNC,)
    assert layouts(lb) == (KVCacheLayout.BLHNC,)
    assert set(layouts(None)) == {KVCacheLayout.BLNHC, KVCacheLayout.BLHNC}
    assert layouts((KVCacheLayout.BLHNC, *lb)) == (KVCacheLayout.BLHNC,)
    assert layouts((KVCacheLayout.LHBNC,)) == ()


steps = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=12)


@given(steps)
def test_shares_are_the_step(rows: list[tuple[int, int]]) -> None:
    """Every row and token is in one share, in its place; what a share cuts out of the metadata is its own."""
    owners, counts = zip(*rows, strict=True)
    router = Router(torch.device("cpu"))
    router.begin_step(owners, counts)
    total = sum(counts)
    batch = CommonAttentionMetadata(
        query_start_loc=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        query_start_loc_cpu=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        seq_lens=torch.arange(len(rows)) + 10,
        seq_lens_cpu_upper_bound=torch.arange(len(rows)) + 10,
        num_reqs=len(rows),
        num_actual_tokens=total,
        max_query_len=max(counts),
        max_seq_len=100,
        block_table_tensor=torch.arange(len(rows)).unsqueeze(1),
        slot_mapping=torch.arange(total) * 7,
        positions=torch.arange(total) * 3,
        is_prefilling=torch.tensor(counts) > 1,
    )
    routing = router.end_step()
    assert routing is not None
    assert router.routing is None
    assert routing.only == (owners[0] if len(set(owners)) == 1 else None)
    assert sorted(routing.shares) == sorted(set(owners))
    starts = np.cumsum([0, *counts])
    for j, share in routing.shares.items():
        own = [i for i, owner in enumerate(owners) if owner == j]
        tokens = [t for i in own for t in range(starts[i], starts[i + 1])]
        cut = share.of(batch)
        assert share.rows.tolist() == own
        assert share.tokens.tolist() == tokens
        assert share.tokens[share.last].tolist() == [starts[i + 1] - 1 for i in own]
        assert cut.query_start_loc.tolist() == np.cumsum([0, *(counts[i] for i in own)]).tolist()
        assert (cut.num_reqs, cut.num_actual_tokens) == (len(own), len(tokens))
        assert cut.max_query_len == max(counts[i] for i in own)
        assert cut.max_seq_len == max(own) + 10
        assert cut.seq_lens.tolist() == [i + 10 for i in own]
        assert cut.block_table_tensor.flatten().tolist() == own
        assert cut.slot_mapping.tolist() == [7 * t for t in tokens]
        assert cut.positions is not None
        assert cut.positions.tolist() == [3 * t for t in tokens]
        assert cut.is_prefilling is not None
        assert cut.is_prefilling.tolist() == [counts[i] > 1 for i in own]


def test_a_step_like_the_last_is_not_routed_anew() -> None:
    router = Router(torch.device("cpu"))
    router.begin_step([0, 1, 0], [1, 1, 1])
    first = router.end_step()
    router.begin_step([0, 1, 0], [1, 1, 1])
    assert router.end_step() is first
    router.begin_step([0, 1, 0], [1, 2, 1])
    assert router.end_step() is not first
