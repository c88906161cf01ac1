"""Attention of one constituent among several.

vLLM builds one metadata object a step for all layers of a KV-cache group, from the whole batch.  A
constituent computes only its own rows, so its layers get a subclass of their attention backend whose metadata
builder cuts the batch first.  vLLM makes its backend for chunked local attention the same way
(`vllm.v1.attention.backend.subclass_attention_backend_with_overrides`).

The same subclass says what the KV cache of the layer looks like: see `engine.constituents.memory`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backend import subclass_attention_backend_with_overrides

from ...constituents.memory import ConstituentSpec, layouts
from .routing import Router

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata


def backend_of(
    base: type[AttentionBackend], constituent: int, block_size: int, config: VllmConfig, router: Router
) -> type[AttentionBackend]:
    """The backend of a constituent's layers.

    Args:
        base: what vLLM chose for them.
        config: the constituent's own, which its metadata builder is to see instead of the base model's.
    """
    builder = _builder_of(base.get_builder_cls(), constituent, config, router)

    def customize_spec(cls: Any, spec: Any) -> ConstituentSpec:
        return ConstituentSpec.of(base.customize_spec(spec), constituent, block_size)

    def supported_kv_cache_layouts(cls: Any) -> Any:
        return layouts(base.supported_kv_cache_layouts())

    return subclass_attention_backend_with_overrides(
        f"Constituent{constituent}",
        base,
        {
            "get_builder_cls": staticmethod(lambda: builder),
            "customize_spec": classmethod(customize_spec),
            "supported_kv_cache_layouts": classmethod(supported_kv_cache_layouts),
        },
    )


def _builder_of(base: type[Any], constituent: int, config: VllmConfig, router: Router) -> type[Any]:
    class ConstituentBuilder(base):
        """Builds nothing for a constituent that has no row in the step."""

        # Metadata of another constituent's rows cannot be updated into this one's.
        supports_update_block_table = False

        def __init__(
            self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, *args: Any, **kwargs: Any
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, config, *args, **kwargs)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            routing = router.routing
            if routing is not None and routing.only != constituent:
                share = routing.shares.get(constituent)
                if share is None:
                    return None
                common_attn_metadata = share.of(common_attn_metadata)
            return super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)

    return ConstituentBuilder
