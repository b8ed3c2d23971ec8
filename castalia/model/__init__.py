"""The transformer, its loss and its initial weights, as plain `nn.Module` code that could be pasted into a notebook.

Begin with `transformer.py`; `attention.py`, `layers.py` and `positions.py` hold its parts, `loss.py` the output head
with the cross-entropy. `init.py` draws initial weights, `lora.py` adds adapters. The room knows no ranks, files or
checkpoints: of our rooms it imports `config` only, which also has the table of all tensors
(`castalia.config.tensor_table`).
"""
