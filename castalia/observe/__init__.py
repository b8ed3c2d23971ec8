"""Looking at runs: what is recorded and shown of their steps, and what is noticed about them.

Begin with `metrics.py`, the records and events in a run's folder. `watch.py` holds the policy for loss spikes,
`layer_stats.py` the statistics of layers, `sinks.py` TensorBoard and W&B, `display.py` the terminal, `curves.py` plots.
Used by `train`, which it does not import; may import `checkpoint`, `parallel` and the rooms below them.
"""
