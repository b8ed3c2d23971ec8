"""What a run will need, by arithmetic: parameters, memory per rank, operations, time and disk. No torch.

Begin with `run_plan.py` (the whole plan), then `count.py`, `memory.py` and `step_cost.py`; `suggest.py` compares
layouts. Other rooms use `layout.py`, `flops.py`, `devices.py` and `run_description.py` as well. Imports `config`, and
`figures` for a picture.
"""
