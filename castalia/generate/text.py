"""Text from a checkpoint in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castalia.data.tokenizer import Tokenizer
from castalia.generate.generation import AnyModel, Prompt, generate
from castalia.loading import load_model, tokenizer_at


def generate_text(
    model: str | Path | AnyModel,
    prompts: Sequence[Prompt],
    tokenizer: str | Path | Tokenizer | None = None,
    **sampling: Any,
) -> list[str]:
    """The texts that follow the prompts: `num_samples` for each, which is one unless told.

    `model`: the path of a checkpoint of any format, or a loaded model. `tokenizer`: that of the checkpoint if left out.
    Keywords are the fields of `castalia.generate.sampling.Sampling`: max_tokens, temperature, top_k, top_p, seed and
    others.
    Raises CheckpointError and DataError as `castalia.load_model` and `castalia.load_tokenizer` do.
    """
    if tokenizer is None:
        if not isinstance(model, str | Path):
            raise TypeError("a loaded model does not know its tokenizer: give tokenizer=")
        tokenizer = model
    chosen = tokenizer_at(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    return generate(load_model(model) if isinstance(model, str | Path) else model, chosen, prompts, **sampling)
