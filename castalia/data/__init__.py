"""Corpora, tokenizers, preparation of text, and the batches of a run as a pure function of config and step.

The way of a batch: `indexed.py` (.bin and .idx files) -> `sample_index.py` (which pieces of documents make a sample,
in which order) -> `blend.py` (which corpus comes next) -> `loader.py` (samples to batches; begin here);
`config_corpora.py` opens what a config names. The way to a corpus: `sources.py` (files of text) -> `chat.py`,
`template.py` (conversations) -> `tokenizer.py` -> `prepare.py`.
The room works with NumPy and imports no torch; of our rooms it imports `config` only.
"""
