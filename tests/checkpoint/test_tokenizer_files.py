"""Tokenizers as transformers 5 saves them, written so that transformers 4 opens them, too.

What 4 does with them was tried with 4.57.6, which cannot be installed beside 5: it knows no class `TokenizersBackend`,
fails at an `extra_special_tokens` that is a list, lets Llama's texts begin with <s> where no setting says otherwise,
and gives models token_type_ids, which `generate` refuses.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer

from castalia.cli.convert import command as convert
from tests.cli.chat_model import TEMPLATE, words

SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>", "unk_token": "<|pad|>"}
TEXT = "user <|im_start|>Who was the first?<|im_end|>"


def saved(folder: Path, name: str, **settings: object) -> Path:
    """A model's folder with a tokenizer of a class of transformers."""
    engine = json.loads(words().backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in engine["merges"]]
    tokenizer = getattr(transformers, name)(vocab=engine["vocab"], merges=merges, **SPECIAL, **settings)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def seen(folder: Path) -> list[object]:
    """What there is to see of a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(TEXT, add_special_tokens=added)["input_ids"] for added in (True, False)]
    named = {key: str(getattr(tokenizer, key)) for key in (*SPECIAL, "padding_side", "model_max_length")}
    texts = [tokenizer.decode(ids[0], skip_special_tokens=skipped) for skipped in (True, False)]
    return [ids, texts, named, sorted(tokenizer.all_special_tokens), tokenizer.chat_template]


@pytest.mark.parametrize(
    ("name", "settings", "ends"),
    [
        ("TokenizersBackend", {"extra_special_tokens": ["<|im_start|>"]}, None),
        ("TokenizersBackend", {"extra_special_tokens": {"image_token": "<|im_start|>"}}, None),
        ("GPT2Tokenizer", {"extra_special_tokens": ["<|im_start|>"]}, None),
        ("LlamaTokenizer", {}, (False, False)),
        ("LlamaTokenizer", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ("GPTNeoXTokenizer", {"add_bos_token": True}, (True, False)),
    ],
)
@pytest.mark.parametrize("form", ["hf", "megatron-deepspeed"])
def test_both_versions_open_what_the_newer_one_saved(name, settings, ends, form, tmp_path):
    source = saved(tmp_path / "source", name, **settings)
    convert(str(source), tmp_path / "out", to=form)
    (file,) = (tmp_path / "out").rglob("tokenizer_config.json")
    out = file.parent
    given = json.loads(file.read_text())
    if form != "hf":
        (out / "config.json").write_bytes((source / "config.json").read_bytes())
    assert seen(out) == seen(source)
    before = json.loads((source / "tokenizer_config.json").read_text())
    assert before["backend"] == "tokenizers", "written by transformers 5"
    assert given["tokenizer_class"] == ("PreTrainedTokenizerFast" if name == "TokenizersBackend" else name)
    extra = before.get("extra_special_tokens", [])
    assert given.get("additional_special_tokens", []) == extra
    named = {key: text for key, text in before.items() if key == "image_token"}
    assert given.get("extra_special_tokens", {}) == named
    assert (given.get("add_bos_token"), given.get("add_eos_token")) == (ends or (None, None))
    assert given.get("model_input_names") == (["input_ids", "attention_mask"] if name == "TokenizersBackend" else None)
    changed = {
        "model_input_names",
        "tokenizer_class",
        "extra_special_tokens",
        "additional_special_tokens",
        "add_bos_token",
        "add_eos_token",
    }
    assert {key: given[key] for key in given.keys() - changed} == {key: before[key] for key in before.keys() - changed}
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_no_model_is_given_token_types(tmp_path):
    source = saved(tmp_path / "source", "TokenizersBackend")
    older = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}  # as 4 wrote it
    (source / "tokenizer_config.json").write_text(json.dumps(older))
    convert(str(source), tmp_path / "out", to="hf")
    given = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert given == {**older, "model_input_names": ["input_ids", "attention_mask"]}


def test_what_both_versions_open_is_copied(tmp_path):
    source = saved(tmp_path / "source", "TokenizersBackend", extra_special_tokens=["<|im_start|>"])
    for number in (1, 2):
        convert(str(source), tmp_path / f"out{number}", to="hf")
        source = tmp_path / f"out{number}"
    first, second = (tmp_path / name / "tokenizer_config.json" for name in ("out1", "out2"))
    assert first.read_bytes() == second.read_bytes()
