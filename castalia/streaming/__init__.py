"""Models that are larger than memory: blocks are read from disk when they are needed, again in each pass.

Begin with `streamed_model.py`, which takes all micro-batches through a block while it is in memory. `read_ahead.py`
reads the next blocks meanwhile; `stream_units.py` says what is read together and in which dtype it is held. How much
stays in memory is decided in `castalia.plan.stream_plan`. The room may import `model`, `parallel`, `checkpoint`,
`plan`, `data`, `storage` and `config`.
"""
