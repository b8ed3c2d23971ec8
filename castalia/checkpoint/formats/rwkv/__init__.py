"""RWKV's own files: one `.pth` with the weights of an RWKV-6 model and nothing else."""
