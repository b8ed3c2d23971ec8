"""The residual stream and the logit lens beside transformers' hidden states."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from castalia.data.tokenizer import ByteTokenizer
from castalia.errors import ConfigError, DataError
from castalia.examine.residuals import logit_lens, parse_layers, pieces_of, write_activations
from castalia.language_model import load_model
from castalia.loading import tokenizer_at
from castalia.storage.safetensors import open_safetensors
from tests.cli.chat_model import make_chat_model

TEXT = "What is the colour of grass, naïve one? 水"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("looked-at") / "model")


@pytest.fixture(scope="module")
def theirs(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def hidden_states(theirs, ids: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The streams before the final norm, and the logits."""
    caught = []
    norm = theirs.base_model.norm
    handle = norm.register_forward_hook(lambda module, inputs, output: caught.append(inputs[0][0]))
    found = theirs(torch.tensor([ids]), output_hidden_states=True)
    handle.remove()
    return [*(state[0] for state in found.hidden_states[:-1]), caught[0]], found.logits[0]


def test_the_lens_is_the_head_after_each_of_transformers_hidden_states(folder, theirs):
    model, tokenizer = load_model(folder), tokenizer_at(folder)
    lens = logit_lens(model, tokenizer, TEXT, top=3)
    states, logits = hidden_states(theirs, list(lens.ids))
    assert len(lens.rows) == len(states) == model.cfg.num_layers + 1
    for row, state in zip(lens.rows, states, strict=True):
        with torch.no_grad():
            seen = theirs.lm_head(theirs.base_model.norm(state))[:, : tokenizer.vocab_size].softmax(-1)
        best = seen.topk(3)
        assert [[guess.id for guess in place] for place in row.top] == best.indices.tolist()
        probs = torch.tensor([[guess.prob for guess in place] for place in row.top])
        torch.testing.assert_close(probs, best.values, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            torch.tensor(row.entropy), torch.distributions.Categorical(probs=seen).entropy(), atol=1e-4, rtol=1e-4
        )
        following = seen[range(len(lens.ids) - 1), lens.ids[1:]]
        torch.testing.assert_close(torch.tensor(row.next_prob), following, atol=1e-5, rtol=1e-4)
    last = logits[:, : tokenizer.vocab_size].softmax(-1)  # the last layer is the model itself
    top = torch.tensor([place[0].prob for place in lens.rows[-1].top])
    torch.testing.assert_close(top, last.max(-1).values, atol=1e-5, rtol=1e-4)


def test_activations_are_transformers_hidden_states_text_by_text(folder, theirs, tmp_path):
    texts = ["short", TEXT, "a third one, longer than the first. " * 3] * 4  # more than go through at a time
    file, output = tmp_path / "x.jsonl", tmp_path / "a.safetensors"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = tokenizer_at(folder)
    total = write_activations(load_model(folder), tokenizer, file, [0, 1, 2], output)
    found = {name: ref.read() for name, ref in open_safetensors(output).items()}
    starts = found["starts"].tolist()
    assert starts[0] == 0 and starts[-1] == total == len(found["ids"]) and len(starts) == len(texts) + 1
    for number, text in enumerate(texts):
        rows = slice(starts[number], starts[number + 1])
        assert found["ids"][rows].tolist() == tokenizer.encode(text)
        states, _ = hidden_states(theirs, tokenizer.encode(text))
        for layer in range(3):
            torch.testing.assert_close(found[f"layer_{layer}"][rows], states[layer], atol=1e-5, rtol=1e-4)


def test_the_pieces_of_tokens_are_the_text(folder):
    tokenizer = tokenizer_at(folder)
    for words in (tokenizer, ByteTokenizer("bytes")):
        pieces = pieces_of(words, words.encode(TEXT))
        assert "".join(pieces) == TEXT and "\ufffd" not in "".join(pieces)
    assert pieces_of(ByteTokenizer("bytes"), [97, 0xE6, 0xB0]) == ["a", "", "\ufffd"]  # cut within a character


def test_layers_are_told_by_number():
    assert parse_layers("5,0,5", 6) == [0, 5] and parse_layers("all", 2) == [0, 1, 2]
    for words in ("7", "-1", "x", ""):
        with pytest.raises(ConfigError, match="0 .* to 6"):
            parse_layers(words, 6)


def test_texts_that_the_model_cannot_take_are_named(folder, tmp_path):
    model, tokenizer, file = load_model(folder), tokenizer_at(folder), tmp_path / "x.jsonl"
    limit = model.cfg.max_positions
    assert limit is not None
    file.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "a b " * limit}) + "\n")
    with pytest.raises(DataError, match=f"text 2 has .* tokens; the model takes {limit}"):
        write_activations(model, tokenizer, file, [0], tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="no tokens"):
        logit_lens(model, tokenizer, "")
    file.write_text("")
    with pytest.raises(DataError, match="no text"):
        write_activations(model, tokenizer, file, [0], tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_the_verbs_give_the_same_numbers(folder, tmp_path):
    def said(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "castalia", *words], capture_output=True, text=True, check=True)
        return done.stdout

    lens = logit_lens(load_model(folder), tokenizer_at(folder), "the grass is")
    found = json.loads(said("inspect", str(folder), "--lens", "the grass is", "--json"))
    assert tuple(found["ids"]) == lens.ids
    assert found["rows"][-1]["next_prob"] == pytest.approx(lens.rows[-1].next_prob, abs=1e-6)
    table = said("inspect", str(folder), "--lens", "the grass is")
    assert f"{lens.rows[-1].top[0][0].prob:.2f}" in table and max(map(len, table.splitlines())) <= 100
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"text": "the grass is"}) + "\n")
    output = tmp_path / "a.safetensors"
    words = ["--file", str(file), "--layers", "0,2", "--output", str(output)]
    assert f"{len(lens.ids)} tokens, layers 0, 2" in said("activations", str(folder), *words)
    assert set(open_safetensors(output)) == {"ids", "starts", "layer_0", "layer_2"}
