"""Several base models in one engine: what all processes agree on.

A *constituent* is a base model of the engine: number 0 is the model that the server was started with,
the others come from the settings.  A term names one by ``model``.  All read the same vocabulary, so that
their logits can be combined, and all keep their KV cache in vLLM's one block pool:

- `memory`: how many tokens a block of each constituent holds, and the KV-cache group of each;
- `adapters`: which constituent a LoRA adapter is for;
- `config`: vLLM's configuration of a constituent, and what is refused at the start.

`engine.core.constituents` allocates a member's blocks in its own constituent's group only;
`engine.worker.constituents` runs each constituent on its own rows of the batch.
"""
