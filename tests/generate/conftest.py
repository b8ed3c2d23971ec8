from collections.abc import Sequence

import pytest
import torch

from castalia.config.schema import ModelConfig
from castalia.model.init import initialize
from castalia.model.transformer import Transformer

TINY = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=257,
    vocab_multiple=64,
    max_positions=64,
    init_std=0.4,
    output_init_method="normal",
)


class Bytes:
    """UTF-8 bytes; 256 ends a document."""

    vocab_size, eod_id, end_ids, byte_ids = 257, 256, frozenset({256}), frozenset()
    special_texts: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Script(Transformer):
    """Writes the given text after any prompt of the given length, whatever the prompt says."""

    def __init__(self, text: str, prompt_length: int) -> None:
        super().__init__(TINY)
        initialize(self, TINY, seed=1)
        self.script = [*text.encode(), 256]
        self.prompt_length = prompt_length
        self.seen = 0

    def hidden(self, tokens, **options):
        self.seen = tokens.shape[1] if tokens.shape[1] > 1 else self.seen + 1
        return super().hidden(tokens, **options)

    def logits(self, x):
        logits = super().logits(x) * 0
        logits[:, self.script[min(self.seen - self.prompt_length, len(self.script) - 1)]] = 1.0
        return logits


@pytest.fixture(scope="session")
def tokenizer() -> Bytes:
    return Bytes()


@pytest.fixture
def scripted():
    return Script


@pytest.fixture
def make_model():
    def make(**update) -> Transformer:
        model = Transformer(TINY.model_copy(update=update))
        initialize(model, model.cfg, seed=1)
        return model.eval()

    torch.manual_seed(0)
    return make
