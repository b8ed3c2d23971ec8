"""Evaluation of a model on corpora: loss, perplexity and bits per byte, and log-probabilities of every token.

Begin with `perplexity.py`; `token_stream.py` reads text files and .bin corpora as one stream of tokens, `log_probs.py`
writes the log-probabilities of a reference model, `prefix_tree.py` computes once what many requests share. The room may
import `streaming`, `loading` and every room below them.
"""
