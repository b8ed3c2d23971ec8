"""An HTTP server for checkpoints: OpenAI's interface, and a page to watch, try and compare them.

Begin with `app.py`, which puts the parts together. `catalogue.py` names the checkpoints, `loaded_models.py` keeps those
that are in use in memory, `engine.py` writes texts with one of them. The room may import everything below `cli`.
"""
