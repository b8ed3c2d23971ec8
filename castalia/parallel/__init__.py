"""Runs a model on one process or on many: process groups, the mesh of ranks, and what is applied to a finished model.

Begin with `executor.py`, the interface that training and evaluation use; then `apply.py`, which shows in one list what
happens to a model on several ranks. `rank_grid.py` says which rank does what, `rendezvous.py`, `process_group.py` and
`watchdog.py` bring the processes together and name those that are lost. No other room builds device meshes or
calls `fully_shard` and `torch.compile`; of the others only `streaming` handles DTensors. May import `config`, `plan`,
`model` and `data`.
"""
