"""Megatron-DeepSpeed's format (the BigScience fork); its tables of tensors are in `neox.names`."""
