"""One block pool for models of different sizes.

A block of the pool is so many *bytes*, whoever has it.  The layers of one constituent form one KV-cache
group, and its blocks hold as many *tokens* as fill those bytes: an 8B model's 16 tokens are a 1B model's 64.
What is left over at a block's end is the constituent's waste.

The layers of a block lie side by side in it (a block-outermost layout), so groups may have different numbers
of layers and different page sizes; vLLM strides all of them by the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_layout import KVCacheLayout

MAX_WASTE = 0.15
"""Share of a block that may be left over without larger blocks being tried, or a warning."""

_LARGEST = 4
"""Blocks are made up to so many times larger to keep the waste small; larger ones fill up too slowly."""


@dataclass(frozen=True)
class Blocks:
    """How the constituents share a block.

    Attributes:
        sizes: tokens in a block of each constituent.
        waste: the share of a block's bytes that each constituent leaves unused.
    """

    sizes: tuple[int, ...]
    waste: tuple[float, ...]

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], token_bytes: Sequence[int]) -> Blocks:
        """token_bytes: bytes of one token in all layers of each constituent."""
        used = [size * token for size, token in zip(sizes, token_bytes, strict=True)]
        return cls(tuple(sizes), tuple(1 - b / max(used) for b in used))

    @classmethod
    def choose(cls, token_bytes: Sequence[int], smallest: int, unit: int) -> Blocks:
        """The smallest blocks whose waste is at most `MAX_WASTE`, or the least wasteful.

        Args:
            token_bytes: bytes of one token in all layers of each constituent.
            smallest: tokens in a block of the constituent with the largest tokens.
            unit: block sizes are multiples of it; what attention kernels ask for.
        """
        largest = max(token_bytes)

        def blocks(times: int) -> Blocks:
            room = times * smallest * largest
            return cls.of_sizes([room // token // unit * unit for token in token_bytes], token_bytes)

        tried = [blocks(times) for times in range(1, _LARGEST + 1)]
        return next((b for b in tried if max(b.waste) <= MAX_WASTE), min(tried, key=lambda b: max(b.waste)))


@dataclass(frozen=True, kw_only=True)
class ConstituentSpec(FullAttentionSpec):
    """The KV cache of a layer: layers of different constituents never share a group.

    Attributes:
        constituent: whose layer it is.
    """

    constituent: int = 0

    @classmethod
    def of(cls, spec: KVCacheSpec, constituent: int, block_size: int) -> ConstituentSpec:
        """The spec of a constituent's layer in blocks of `block_size` tokens.

        Raises:
            ValueError: the layer is not one of full attention.
        """
        if type(spec) is not FullAttentionSpec or spec.attention_chunk_size or spec.sliding_window:
            raise ValueError(
                "marith: constituents need full attention in every layer; "
                f"a layer of constituent {constituent} has a {type(spec).__name__}"
            )
        return replace_as(spec, cls, constituent=constituent, block_size=block_size)

    @classmethod
    def merge(cls, specs: list[Any]) -> ConstituentSpec:
        """vLLM's merge, of one constituent's layers.

        Raises:
            AssertionError: they cannot share a group, which is how vLLM asks.
        """
        constituents = {getattr(spec, "constituent", None) for spec in specs}
        assert len(constituents) == 1, "layers of different constituents do not share a KV-cache group"
        return replace(super().merge(specs), constituent=specs[0].constituent)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, ConstituentSpec) and spec.constituent == self.constituent
            for spec in kv_cache_specs.values()
        )


def layouts(supported: Sequence[KVCacheLayout] | None) -> tuple[KVCacheLayout, ...]:
    """The block-outermost layouts that kernels read which read `supported` (None: any).

    Kernels read one layer's view of the cache, so what lies inside a block matters to them, and not
    whether layers or blocks come first in memory.
    """
    twins = {KVCacheLayout.LBNHC: KVCacheLayout.BLNHC, KVCacheLayout.LBHNC: KVCacheLayout.BLHNC}
    found = [twins.get(layout, layout) for layout in (tuple(twins) if supported is None else supported)]
    return tuple(dict.fromkeys(layout for layout in found if layout in twins.values()))
