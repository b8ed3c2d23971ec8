"""Text from a model: prefill of prompts, KV cache, sampling, streaming of text, and fast weights for CPUs.

Begin with `generation.py`; `kv_cache.py` holds the keys and values of earlier tokens, `sampling.py` chooses tokens,
`text_stream.py` turns them into text. `packed_model.py` converts a model for decoding on a CPU. The room may import
`streaming`, `loading` and every room below them.
"""
