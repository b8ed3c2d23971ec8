"""The tokenizer that a run opens, and how many entries its model's vocabulary has. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from castalia.config.input_files import missing_tokenizer
from castalia.config.schema import FinetuneConfig, ModelConfig, RunConfig
from castalia.errors import ConfigError, DataError

if TYPE_CHECKING:
    from castalia.checkpoint.tensors import Checkpoint
    from castalia.data.tokenizer import Tokenizer


def with_tokenizer_of(config: RunConfig, source: Checkpoint | None) -> RunConfig:
    """The config of a new run that names no tokenizer, with that of the checkpoint which it begins from, if it is
    there: the tokens of the model mean what they did."""
    named = config.tokenizer.path or config.tokenizer.kind
    if source is None or named or not config.checkpoint.init_from:
        return config
    from castalia.checkpoint.description import tokenizer_settings

    settings = tokenizer_settings(source)
    if settings is None or next(missing_tokenizer(config.with_({"tokenizer": settings})), None):
        return config
    return config.with_({"tokenizer": settings})


def open_tokenizer(config: RunConfig, finetune: FinetuneConfig) -> Tokenizer | None:
    """The tokenizer that the config names, with the tokens that fine-tuning adds to it."""
    named = config.tokenizer.path or config.tokenizer.kind
    if missing := list(missing_tokenizer(config)):
        raise DataError("\n".join(missing))
    if not named and not finetune.add_tokens:
        return None
    from castalia.data.tokenizer import add_tokens, load_tokenizer  # with NumPy, which a plan does without

    tokenizer = load_tokenizer(config.tokenizer, neox=config.neox_exact) if named else None
    if finetune.add_tokens:
        if tokenizer is None:
            raise ConfigError("finetune.add_tokens needs the tokenizer that gets them: give tokenizer.path")
        add_tokens(tokenizer, finetune.add_tokens)
    return tokenizer


def vocabulary_sizes(
    config: RunConfig, model: ModelConfig, source: Checkpoint | None, tokenizer: Tokenizer | None, *, grows: bool
) -> dict[str, int]:
    """The model's `vocab_size`, and its `vocab_multiple` where that has to change to keep the number of rows.

    `grows`: the tokenizer has been given new entries. Raises ConfigError if the model is too small for the tokenizer.
    """
    size = model.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    if size is None:
        raise ConfigError("the vocabulary is unknown: give tokenizer.path, or model.vocab_size without a tokenizer")
    if tokenizer is None or tokenizer.vocab_size == size:
        return {"vocab_size": size}
    entries = tokenizer.vocab_size
    if entries > size and not grows:
        raise ConfigError(
            f"model.vocab_size={size} is smaller than the tokenizer's vocabulary of {entries} "
            f"({config.tokenizer.path or config.tokenizer.kind}); "
            "leave model.vocab_size out, or name the tokenizer that belongs to the model"
        )
    if entries > size:
        return {"vocab_size": entries}
    # Files of other programs give the number of rows, padding included; the tokenizer knows how many are in use.
    is_foreign = source is not None and source.format != "native" and not (config.model and config.model.vocab_size)
    if not is_foreign:
        return {"vocab_size": size}
    rows = model.padded_vocab_size
    same_rows = model.with_({"vocab_size": entries}).padded_vocab_size == rows
    return {"vocab_size": entries} if same_rows else {"vocab_size": entries, "vocab_multiple": rows}
