"""The configuration of a run: schema, loading, checks, presets, and facts derived from a config alone.

Begin with `load.py` (files to a `RunConfig`) and `schema.py` (every setting); `neox/` translates GPT-NeoX's keys.
`batch.py`, `layout_rules.py`, `lr_schedule.py`, `attention_kernels.py`, `tensor_table.py` and others hold what model,
planner, data and training must agree on. Imports no other room, but modules below it such as `errors` and `reading`;
no torch.
"""
