"""Small models with tokenizers of two kinds, as folders that transformers opens, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install castalia[eval]")

import tokenizers  # noqa: E402
import torch  # noqa: E402
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from castalia.data.tokenizer import train_bpe  # noqa: E402

TEXTS = Path(__file__).parents[2] / "castalia/tasks/demo/demo_verses.jsonl"
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def verses() -> list[str]:
    return [json.loads(line)["text"] for line in TEXTS.read_text().splitlines()]


def neox(place: Path) -> None:
    """GPT-NeoX with a byte-level vocabulary whose one special token begins and ends documents."""
    words = train_bpe(verses(), 300)
    words.save(place)
    (place / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
        )
    )
    GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **SHAPE,
            vocab_size=words.vocab_size,
            max_position_embeddings=96,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
    ).save_pretrained(place)


def llama(place: Path) -> None:
    """Llama with a vocabulary whose words begin with a mark, and which puts `<s>` before each text."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    engine.decoder = tokenizers.decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    engine.train_from_iterator(verses(), trainer)
    engine.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    engine.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
                "eos_token": "</s>", "chat_template": TEMPLATE,
            }
        )
    )  # fmt: skip
    LlamaForCausalLM(
        LlamaConfig(
            **SHAPE,
            num_key_value_heads=2,
            vocab_size=300,
            max_position_embeddings=96,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
    ).save_pretrained(place)


@pytest.fixture(scope="session")
def neox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("neox")
    neox(place)
    return place


@pytest.fixture(scope="session", params=[neox, llama], ids=["neox", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp(request.param.__name__)
    request.param(place)
    return place
