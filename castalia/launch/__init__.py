"""Scripts that start a run on many machines with torchrun, Slurm or Kubernetes.

Begin with `render.py`, which fills in the files of `templates/`; `hosts.py` reads hostfiles. Imports `parallel` for
torchrun's settings and nothing above it.
"""
