"""Checkpoints of every format as one kind of object: named lazy tensors, optimizer state, progress and config.

Begin with `tensors`, which defines `Checkpoint`, then `opener`, which opens any path, and `rules`, the tables between
formats. `formats` has a folder for each format; `convert` writes checkpoints in another format by its `file_plan`;
`restore` fills parameters and optimizers. May import `config`, `plan`, `data` (for tokenizers), `storage` and small
functions of `model`, but no modules of networks: `castalia.loading` builds a checkpoint's model.
"""
