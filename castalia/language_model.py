"""The model of a checkpoint as Python code uses it: a plain module that also writes and scores texts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.checkpoint.tensors import Checkpoint
from castalia.checkpoint.transformers_objects import Savable, written
from castalia.data.tokenizer import Tokenizer
from castalia.errors import CheckpointError, DataError
from castalia.evaluate.record_batches import answers_encoder, record_of, rewards_encoder
from castalia.evaluate.scores import score_records
from castalia.generate.generation import Prompt, generate
from castalia.loading import build_as, tokenizer_at
from castalia.model.transformer import Transformer
from castalia.parallel.executor import Executor


class LanguageModel(Transformer):
    """A loaded model: `model(tokens)` gives logits [batch, time, padded vocabulary], in eval mode.

    `checkpoint` is what it was loaded from; None for an object of the library transformers.
    """

    checkpoint: Checkpoint | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's, or the one that `load_model` was given. Raises CheckpointError where there is none."""
        if self.checkpoint is None:
            raise CheckpointError("an object of transformers does not name its tokenizer: load_model(..., tokenizer=)")
        return load_tokenizer_for(self.checkpoint)

    def generate(self, prompts: str | Sequence[Prompt], **sampling: Any) -> list[str]:
        """The text that follows each prompt, a text or token ids; `num_samples` texts for each.

        Keywords are the fields of `castalia.generate.generation.Sampling`: max_tokens, temperature, top_k, top_p, seed,
        stop, num_samples, batch_size. Raises DataError for a prompt that the model cannot take, ConfigError for a value
        out of its range and for a reward model.
        """
        self.refuse_tokens_of_a_reward_model()
        return generate(self, self.tokenizer, [prompts] if isinstance(prompts, str) else prompts, **sampling)

    def score(
        self, records: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]], batch_size: int = 8
    ) -> list[dict[str, Any]]:
        """How likely each text is, or what a reward model thinks of it, as `castalia score` has it.

        A record is a text, or what a line of a file of `castalia score` holds: messages, a prompt with an answer, a
        pair. Each comes back with `logprob` (in nats) and `tokens`, of reward models with `score`; for pairs, each name
        begins with chosen_ or rejected_. The end of a text counts, too. Raises DataError, with its number, for what is
        no such record.
        """
        encode = (rewards_encoder if self.cfg.reward_head else answers_encoder)(self.tokenizer, None)
        read = []
        for number, record in enumerate([records] if isinstance(records, str | Mapping) else records, start=1):
            try:
                if not isinstance(record, str | Mapping):
                    raise ValueError(f"expected a text or the fields of a record, found {type(record).__name__}")
                read.append(record_of({"text": record} if isinstance(record, str) else dict(record), encode))
            except ValueError as error:
                raise DataError(f"record {number}: {error}") from None
        return score_records(Executor(self, batch_size), read, batch_size) if read else []


def load_model(
    source: str | Path | Savable,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    step: int | None = None,
    tokenizer: str | Path | Tokenizer | Savable | None = None,
) -> LanguageModel:
    """The model of a checkpoint of any format, or a model object of the library transformers.

    `dtype`: of the computation and the parameters, but for those that stay fp32; None for fp32, which holds every
    stored value exactly. `step`: which of several checkpoints; None: the latest. `tokenizer`: another one than the
    checkpoint's, a file, a folder or an object; an object of transformers knows none.
    Warns of settings that had to be guessed or interpreted. Raises CheckpointError as `castalia.open_checkpoint` does,
    and for a class of transformers whose architecture is not known.
    """
    if isinstance(source, str | Path):
        checkpoint = open_checkpoint(source, step=step)
        model = build_as(LanguageModel, checkpoint, device, dtype)
        model.checkpoint = checkpoint
    else:
        with written(source) as folder:
            checkpoint = open_checkpoint(folder, step=step)
            model = build_as(LanguageModel, checkpoint, device, dtype)  # reads all values
    for note in checkpoint.notes:
        warnings.warn(f"{source if model.checkpoint else type(source).__name__}: {note}", stacklevel=2)
    if tokenizer is not None:
        model.tokenizer = _tokenizer(tokenizer)
    return model


def _tokenizer(given: str | Path | Tokenizer | Savable) -> Tokenizer:
    if isinstance(given, Tokenizer):
        return given
    if isinstance(given, str | Path):
        return tokenizer_at(given)
    with written(given) as folder:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise DataError(f"the {type(given).__name__} writes no tokenizer.json, which fast tokenizers do; give one")
        return tokenizer_at(file)
