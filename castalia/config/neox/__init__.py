"""GPT-NeoX's configs, read (`read.py`) and written (`write.py`) by one table of its 321 arguments (`keys.py`).

Arguments that depend on each other are in `model_keys.py` and `training_keys.py`, which work on a `Translation`.
"""
