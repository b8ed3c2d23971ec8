"""The residual stream of a model, layer by layer: what each layer would predict, and its values in a file.

Layer 0 is what enters the first block, layer n what leaves the n-th. All are taken before the final norm;
`hidden_states` of the library transformers are the same, but that its last one has gone through the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.data.sources import documents, find_files
from castalia.data.tokenizer import Tokenizer
from castalia.errors import ConfigError, DataError
from castalia.files import appearing_whole
from castalia.model.transformer import Transformer
from castalia.storage.lazy import InMemory
from castalia.storage.safetensors import write_safetensors
from castalia.streaming.scratch_file import zeros_on_disk

ROWS = 8  # texts in a forward pass
BROKEN = "\ufffd"  # what bytes that are no whole character are decoded to


@torch.no_grad()
def residuals(model: Transformer, tokens: Tensor) -> Iterator[Tensor]:
    """The residual stream [b, t, h] of tokens [b, t]: before the first block, then after each block."""
    x, context = model.enter(tokens)
    with model.kernels(x, None):
        yield x
        for block in model.blocks.values():
            x = block(x, context)
            yield x


@dataclass(frozen=True)
class Guess:
    """A token that a layer predicts."""

    id: int
    text: str
    prob: float


@dataclass(frozen=True)
class LensRow:
    """What one layer predicts after each token, as if the final norm and the head followed it."""

    layer: int
    top: tuple[tuple[Guess, ...], ...]  # after each token, the likeliest first
    entropy: tuple[float, ...]  # after each token, in nats
    next_prob: tuple[float, ...]  # of the token that does follow; one fewer than tokens


@dataclass(frozen=True)
class Lens:
    """The logit lens of a text. Source: nostalgebraist, "interpreting GPT: the logit lens" (2020)."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]  # of the tokens
    rows: tuple[LensRow, ...]  # from layer 0 to the last, which predicts what the model does

    def as_json(self) -> dict[str, Any]:
        """Everything, as values of JSON."""
        return asdict(self)


@torch.no_grad()
def logit_lens(model: Transformer, tokenizer: Tokenizer, text: str, top: int = 5) -> Lens:
    """The logit lens of a text. Raises DataError for a text without tokens or with more than the model takes."""
    ids = tokenizer.encode(text)
    require_length(ids, model, "the text")
    tokens, rows = torch.tensor([ids], device=model.device), []
    for layer, x in enumerate(residuals(model, tokens)):
        log_probs = model.logits(model.leave(x))[0].float()[:, : tokenizer.vocab_size].log_softmax(-1)  # [t, V]
        best = log_probs.topk(min(top, log_probs.shape[1]))
        following = log_probs[:-1].gather(1, tokens[0, 1:, None])[:, 0].exp()
        rows.append(
            LensRow(
                layer,
                tuple(
                    tuple(Guess(i, token_text(tokenizer, i), p) for i, p in zip(places, probs, strict=True))
                    for places, probs in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
                ),
                tuple((-(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)).tolist()),
                tuple(following.tolist()),
            )
        )
    return Lens(tuple(ids), tuple(pieces_of(tokenizer, ids)), tuple(rows))


def require_length(ids: Sequence[int], model: Transformer, what: str) -> None:
    """Raises DataError unless the model can take these tokens."""
    limit, size = model.cfg.max_positions, model.cfg.padded_vocab_size
    if not ids:
        raise DataError(f"{what} has no tokens")
    if limit is not None and len(ids) > limit:
        raise DataError(f"{what} has {len(ids)} tokens; the model takes {limit}")
    if (largest := max(ids)) >= size:
        raise DataError(f"{what} has the token id {largest}, beyond the model's vocabulary of {size}")


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """How one token reads: special tokens as a text spells them, parts of characters as the vocabulary writes them."""
    text = tokenizer.special_texts.get(token) or tokenizer.decode([token])
    return text if text and BROKEN not in text else tokenizer.token(token) or text or f"<{token}>"


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token. Together they are the whole text, special tokens included; a character of several tokens
    is the last one's."""
    pieces, begun, shown = list[str](), 0, 0
    for end, token in enumerate(ids, start=1):
        if special := tokenizer.special_texts.get(token):
            pieces.append(special)
            begun, shown = end, 0
            continue
        text = tokenizer.decode(ids[begun:end])
        certain = len(text) if end == len(ids) or not text.endswith(BROKEN) else len(text.rstrip(BROKEN))
        pieces.append(text[shown:certain])
        shown = max(shown, certain)
    return pieces


def parse_layers(text: str, num_layers: int) -> list[int]:
    """`0,5` or `all` as layers. Raises ConfigError for what is no layer of the model."""
    if text.strip() == "all":
        return list(range(num_layers + 1))
    layers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if any(not 0 <= layer <= num_layers for layer in layers):
        raise ConfigError(f"--layers {text}: the model's layers are 0 (what enters the first block) to {num_layers}")
    return sorted(set(layers))


def write_activations(
    model: Transformer,
    tokenizer: Tokenizer,
    file: Path,
    layers: Sequence[int],
    output: Path,
    advance: Callable[[int], None] = lambda texts: None,
) -> int:
    """Write the residual stream of all texts of a file, and return the number of tokens.

    The file has `layer_N` [tokens, h] in fp32 for each layer, `ids` [tokens] and `starts` [texts + 1]: the tokens of
    text i are rows starts[i] to starts[i + 1]. `advance` is called with the number of texts that are done. Raises
    DataError, with its number, for a text that the model cannot take.
    """
    texts = [tokenizer.encode(text) for text in documents(find_files([file]))]
    if not texts:
        raise DataError(f"{file}: the file holds no text")
    for number, ids in enumerate(texts, start=1):
        require_length(ids, model, f"{file}: text {number}")
    starts = torch.tensor([0, *map(len, texts)]).cumsum(0)
    total = int(starts[-1])
    values = {layer: zeros_on_disk((total, model.cfg.hidden_size), torch.float32) for layer in layers}
    for first in range(0, len(texts), ROWS):
        part = texts[first : first + ROWS]
        width = max(map(len, part))
        # Tokens see none of those after them, so what fills the shorter rows changes nothing.
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in part], device=model.device)
        for layer, x in enumerate(residuals(model, tokens)):
            if layer in values:
                for row, ids in enumerate(part):
                    start = int(starts[first + row])
                    values[layer][start : start + len(ids)] = x[row, : len(ids)].float().cpu()
        advance(len(part))
    refs = {"ids": InMemory(torch.tensor([token for each in texts for token in each])), "starts": InMemory(starts)}
    refs |= {f"layer_{layer}": InMemory(value) for layer, value in values.items()}
    with appearing_whole(output) as path:
        write_safetensors(path, refs, checksums=False)
    return total
