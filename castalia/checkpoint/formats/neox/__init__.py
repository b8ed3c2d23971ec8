"""GPT-NeoX's format. `names`: the tables of tensors; `architecture`: what tensors show; `written_config`: configs."""
