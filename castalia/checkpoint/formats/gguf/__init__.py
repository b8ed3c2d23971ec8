"""GGUF, which llama.cpp, Ollama and LM Studio read: one file with the model and its tokenizer, no optimizer state.

`names` has the tensors, and which models llama.cpp computes; `gguf_metadata` the settings of the model,
`gguf_vocabulary` those of the tokenizer.
"""
