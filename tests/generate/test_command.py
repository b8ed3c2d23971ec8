"""`castalia generate` on a small Hugging Face folder with a byte tokenizer."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from castalia.cli import main as cli
from castalia.config.schema import TokenizerConfig
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from castalia.errors import CheckpointError
from castalia.generate.generation import TextPiece, generate, in_order
from castalia.language_model import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its tokenizer."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("model")
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    GPTNeoXForCausalLM(
        GPTNeoXConfig(**shape, vocab_size=257, max_position_embeddings=48, initializer_range=0.3)
    ).save_pretrained(place)
    ByteTokenizer("bytes").save(place / "tokenizer")
    return place


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def call(*args: str) -> str:
        words = ["castalia", "generate", str(folder), "--tokenizer", str(folder / "tokenizer"), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*words, *args])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert stop.value.code == 0, err
        return out

    return call


@pytest.fixture
def texts(folder):
    def call(prompts, **sampling):
        return generate(load_model(folder), ByteTokenizer("bytes"), prompts, **sampling)

    return call


def test_prompts_and_their_texts(run, texts):
    one, two = texts(["In", "the beginning"], max_tokens=9, temperature=0.8, top_k=50, seed=3)
    options = ("--max-tokens", "9", "--temperature", "0.8", "--top-k", "50", "--seed", "3")
    assert run("--prompt", "In", "--prompt", "the beginning", *options) == f"In{one}\n\nthe beginning{two}\n"


def test_json_samples_without_a_prompt(run, texts):
    out = run("--json", "--num-samples", "3", "--temperature", "1", "--max-tokens", "5")
    expected = texts([""], num_samples=3, temperature=1.0, max_tokens=5)
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": "", "text": text, "finish_reason": "length"} for text in expected
    ]


def test_a_file_of_prompts_and_an_overlay(run, texts, tmp_path):
    (tmp_path / "prompts.txt").write_text("In\n\nthe beginning\n")
    (tmp_path / "text_generation.yml").write_text(
        '{"text_gen_type": "input-file", "maximum_tokens": 7, "temperature": 1.0, "top_p": 0.5, "top_k": 0,\n'
        f' "sample_input_file": "{tmp_path}/prompts.txt", "sample_output_file": "{tmp_path}/out.jsonl"}}'
    )
    out = run("--config", str(tmp_path / "text_generation.yml"), "--top-p", "0.9")
    one, two = texts(["In", "the beginning"], max_tokens=7, temperature=1.0, top_p=0.9)
    assert out == f"In{one}\n\nthe beginning{two}\n"
    saved = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["text"]) for line in saved] == [("In", one), ("the beginning", two)]


def test_a_file_of_prompts_is_cut_at_newlines_alone(run, texts, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffIn\u2028deed\r\nthe\x0b beginning\n".encode())
    out = run("--file", str(tmp_path / "prompts.txt"), "--max-tokens", "3", "--json")
    assert [json.loads(line)["prompt"] for line in out.strip().split("\n")] == ["In\u2028deed", "the\x0b beginning"]


def test_prompts_in_json_lines(run, tmp_path):
    lines = ['"In"', '{"prompt": "the\\nbeginning"}', "", '{"text": "was", "id": 3}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    out = run("--file", str(tmp_path / "prompts.jsonl"), "--max-tokens", "3", "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["In", "the\nbeginning", "was"]


@pytest.mark.parametrize("options", [(), ("--temperature", "0.8", "--top-k", "50"), ("--dtype", "int8")], ids=str)
def test_texts_within_a_budget_of_memory(run, tmp_path, options):
    """All prompts at once, whatever the batch size would be in memory."""
    (tmp_path / "prompts.txt").write_text("In\nthe beginning\nwas\n" * 7)
    arguments = ("--file", str(tmp_path / "prompts.txt"), "--max-tokens", "9", *options)
    assert run(*arguments, "--memory", "1GB") == run(*arguments)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_encoding(folder, encoding):
    """What it cannot show becomes a question mark; JSON loses nothing."""
    words = ["generate", str(folder), "--tokenizer", str(folder / "tokenizer"), "--device", "cpu", "--max-tokens", "2"]
    command = [sys.executable, "-m", "castalia", *words, "--prompt", "Größe 語", "--json"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode(encoding))["prompt"] == "Größe 語"


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_fewer_bits(run, dtype):
    assert len(run("--prompt", "In", "--max-tokens", "9", "--dtype", dtype)) > len("In\n")


@pytest.fixture
def sampled(folder, tmp_path, monkeypatch, capsys):
    """Runs `generate` on a model whose generation_config.json holds the values; text and what stderr says."""
    place = tmp_path / "sampled"
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("tokenizer"))
    train_bpe(["a"], 257).save(place)

    def call(values, *args, code=0):
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **values}))
        monkeypatch.setattr(sys, "argv", ["castalia", "generate", str(place), "--prompt", "In", "--seed", "4", *args])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert stop.value.code == code, err
        return out, " ".join(err.split())  # as lines are wrapped

    def expected(**sampling):
        tokenizer = load_tokenizer(TokenizerConfig(path=str(place)))
        return f"In{generate(load_model(place), tokenizer, ['In'], seed=4, **sampling)[0]}\n"

    call.expected = expected
    return call


def test_what_the_models_files_say_of_sampling_happens(sampled):
    values = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 20, "repetition_penalty": 1.2}
    out, err = sampled(values)
    assert out == sampled.expected(temperature=0.7, top_k=50, top_p=0.9, max_tokens=20)
    said = "sampling as it says: temperature 0.7, top_k 50, top_p 0.9, max_tokens 20; of no effect here: repetition"
    assert said in err and "generation_config.json" in err


def test_it_stands_below_the_command_line_and_the_config(sampled, tmp_path):
    (tmp_path / "own.yml").write_text("generate: {top_p: 0.0}")
    values = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    out, err = sampled(values, "--config", str(tmp_path / "own.yml"), "--temperature", "1.5", "--max-tokens", "20")
    assert out == sampled.expected(temperature=1.5, max_tokens=20)
    assert err.endswith("sampling as it says: top_k 0")


def test_without_do_sample_it_is_greedy_and_says_what_does_not_act(sampled):
    out, err = sampled({"temperature": 0.7, "max_new_tokens": 9})
    assert out == sampled.expected(max_tokens=9)
    said = "max_tokens 9; of no effect here: temperature 0.7 (without do_sample: the likeliest token)"
    assert said in " ".join(err.split())
    assert sampled({}) == (sampled.expected(), "")


def test_a_value_that_cannot_be_is_named_with_its_file(sampled):
    out, err = sampled({"do_sample": True, "top_p": 2}, code=2)
    assert out == "" and "generation_config.json: top_p is 2: " in err and "--top-p" in err
    assert sampled({"do_sample": True, "top_p": 2}, "--top-p", "0.9")[1].startswith("note")


def test_interactive_reads_prompts_until_the_end(run, texts, monkeypatch):
    lines = iter(["In\n", "the beginning\n", ""])
    monkeypatch.setattr(sys.stdin, "readline", lambda: next(lines))
    assert run("--interactive", "--max-tokens", "5") == "".join(
        f"{texts([prompt], max_tokens=5)[0]}\n" for prompt in ("In", "the beginning")
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "a", "--interactive"], "--prompt and --interactive exclude each other"),
        (["--prompt", "x" * 49], "has 49 tokens; the model takes 48"),
        (["--file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--config", "nowhere.yml"], "nowhere.yml: no such file"),
        (["--dtype", "int8", "--tp", "2"], "int8 is for one process on a CPU"),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--prompt", "a", "--memory", "much"], "--memory much: write an amount such as 4GB"),
        (["--prompt", "a", "--memory", "100MB"], "the least that works here is --memory 0.3"),
        (["--prompt", "a", "--prompt", "b\udcff"], "prompt 2 is not UTF-8 at character 1: 'b\\udcff'"),
    ],
)
def test_mistakes_are_one_message(folder, args, message, monkeypatch, capsys):
    words = ["castalia", "generate", str(folder), "--tokenizer", str(folder / "tokenizer"), *args]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and message in err


def test_rows_come_in_order():
    pieces = [(1, "b"), (0, "a"), (2, "c", "stop"), (0, "A", "length"), (1, "B"), (1, "!", "stop")]
    ordered = list(in_order(TextPiece(*piece) for piece in pieces))
    assert ordered == [
        (0, "a", None),
        (0, "A", "length"),
        (1, "b", None),
        (1, "B", None),
        (1, "!", "stop"),
        (2, "c", "stop"),
    ]


@pytest.mark.parametrize(
    ("value", "verb"),
    [
        (float("nan"), ["generate", "--device", "cpu", "--prompt", "In"]),
        (float("inf"), ["generate", "--device", "cpu", "--prompt", "In"]),
        (float("nan"), ["eval", "--data", "text.txt", "data.seq_length=16", "train.device=cpu"]),
        (float("inf"), ["eval", "--data", "corpus", "--log-probs", "out", "data.seq_length=16", "train.device=cpu"]),
    ],
    ids=["generate nan", "generate inf", "eval", "log-probs"],
)
def test_nothing_is_computed_with_weights_that_are_not_finite(folder, value, verb, tmp_path, monkeypatch, capsys):
    """Also where the text never meets them: in the row of another token, in a block's bias."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("In the beginning " * 9)
    with DatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add(np.arange(1, 60))
    shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["gpt_neox.layers.1.attention.dense.bias"][3:5] = value
    tensors["embed_out.weight"][255, 0] = value
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    tokenizer = [] if "--log-probs" in verb else ["--tokenizer", str(folder / "tokenizer")]
    monkeypatch.setattr(sys, "argv", ["castalia", verb[0], str(tmp_path / "model"), *tokenizer, *verb[1:]])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert "blocks.1.attn.out.bias has 2 NaN or infinite values of 32" in err and "and 1 other tensors" in err
    assert "The first place is blocks.1;" in err


def test_a_model_that_overflows_says_so(folder):
    model = load_model(folder)
    with torch.no_grad():
        model.norm.weight.fill_(3e38)
        model.head.weight.fill_(3e38)
    with pytest.raises(CheckpointError, match="logits are NaN or infinite though its weights are not"):
        generate(model, ByteTokenizer("bytes"), ["In"], max_tokens=2)
