"""Several base models in one worker.

- `routing`: which rows and tokens of a step are whose;
- `models`: the module that vLLM's runner sees as its model, and that runs each constituent on its own;
- `adapters`: LoRA adapters, each constituent's on its own rows;
- `attention`: each constituent's attention metadata, cut to its rows, and its KV-cache spec;
- `loader`: how the constituents are loaded.
"""
