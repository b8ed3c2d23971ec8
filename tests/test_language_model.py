"""What Python code calls: names that stay, silent calls, and objects of transformers in place of paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import castalia
from castalia.cli.score import command as score
from castalia.data.dataset_writer import DatasetWriter
from castalia.errors import CheckpointError, ConfigError, DataError
from tests.cli.chat_model import make_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("api") / "model")


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    numbers = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "c", np.uint16) as writer:
        for _ in range(40):
            writer.add(numbers.integers(0, 64, 30))
    return str(tmp_path / "c")


def small() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=64, max_position_embeddings=32)).eval()


def test_the_names_are_those_that_users_rely_on() -> None:
    assert castalia.__all__ == dir(castalia) == ["__version__", *sorted(castalia._PUBLIC)]
    assert all(callable(getattr(castalia, name)) for name in castalia._PUBLIC)
    packages = {path.parent.name for path in Path(castalia.__file__).parent.glob("*/__init__.py")}
    assert not packages & castalia._PUBLIC.keys()  # importing the package would replace the function
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        castalia.nothing  # noqa: B018


def test_type_checkers_see_the_same_functions_that_are_imported_when_asked_for() -> None:
    source = Path(castalia.__file__).read_text()
    for name, (module, attribute) in castalia._PUBLIC.items():
        assert f"    from {module} import {attribute} as {name}\n" in source


def test_importing_the_package_imports_nothing_slow() -> None:
    code = "import castalia, sys; print(len({'torch', 'numpy', 'pydantic', 'yaml', 'rich'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"


def test_a_loaded_model_writes_what_the_command_writes_and_scores_what_it_scores(folder, tmp_path, capsys):
    model = castalia.load_model(folder)
    assert model.generate("hello", max_tokens=5) == model.generate(["hello"], max_tokens=5)
    assert len(model.generate(["a", [1, 2]], max_tokens=2, num_samples=2, temperature=1.0)) == 4
    texts = ["the grass is green", "and the sky"]
    found = model.score(texts)
    assert capsys.readouterr() == ("", "")
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    score(str(folder), tmp_path / "texts.jsonl")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found
    ids = torch.tensor([[*model.tokenizer.encode(texts[0]), model.tokenizer.eod_id]])  # its end counts, too
    with torch.no_grad():
        log_probs = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert found[0]["logprob"] == pytest.approx(float(log_probs.sum()), rel=1e-5)
    pair = {"prompt": "the grass is", "chosen": " green", "rejected": " blue"}
    assert model.score([pair])[0].keys() == {
        *pair,
        "chosen_logprob",
        "chosen_tokens",
        "rejected_logprob",
        "rejected_tokens",
    }
    with pytest.raises(DataError, match="record 2: the fields nothing"):
        model.score(["a text", {"nothing": 1}])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0: expected 1 or more"),
        ({"temperature": -1.0}, r"temperature=-1\.0: expected 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 1.5}, r"top_p=1\.5: expected 0 to 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"stop": ("", "a")}, "stop has an empty string"),
    ],
)
def test_settings_of_texts_that_make_no_sense_are_refused(folder, sampling, message) -> None:
    with pytest.raises(ConfigError, match=message):
        castalia.load_model(folder).generate("hello", **sampling)


def test_prompts_and_records_that_are_none_are_refused(folder) -> None:
    model = castalia.load_model(folder)
    for prompts in ([1, 2], [[1.5]], [None]):
        with pytest.raises(DataError, match="is neither a text nor a list of token ids"):
            model.generate(prompts)
    with pytest.raises(DataError, match=r"has token -1, but the model knows"):
        model.generate([[3, -1]])
    assert model.generate(torch.tensor([[1, 2]]), max_tokens=3) == model.generate([[1, 2]], max_tokens=3)
    (text,) = model.generate("hello", max_tokens=9)
    assert model.generate("hello", max_tokens=9, stop=text[2:4]) == [text[: text.index(text[2:4])]]
    assert model.score([]) == [] and model.score({"text": "a b"}) == model.score("a b")
    with pytest.raises(DataError, match="record 2: expected a text or the fields of a record, found int"):
        model.score(["a", 5])


def test_weights_are_read_by_name_from_the_checkpoint_itself(folder):
    checkpoint = castalia.open_checkpoint(folder)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(checkpoint[name].read(), castalia.load_model(folder).state_dict()[name])
    assert name in checkpoint and "nothing" not in checkpoint and list(checkpoint) == list(checkpoint.model)
    with pytest.raises(KeyError, match=r"near it: .*blocks\.0\.attn\.qkv\.weight"):
        checkpoint["blocks.0.attn.qkv.wieght"]


def test_a_model_object_of_transformers_gives_the_same_logits(capfd) -> None:
    theirs, tokens = small(), torch.randint(64, (2, 9))
    ours = castalia.load_model(theirs)
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"does not name its tokenizer: load_model\(\.\.\., tokenizer=\)"):
        ours.generate("a text")


def test_a_tokenizer_object_of_transformers_is_taken_too(folder) -> None:
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    found = castalia.load_model(theirs, tokenizer=words)
    assert found.generate("hello", max_tokens=5) == castalia.load_model(folder).generate("hello", max_tokens=5)


def test_a_tokenizer_object_that_is_not_fast_is_refused_by_its_name(folder) -> None:
    words = ByT5Tokenizer()
    with pytest.raises(DataError, match=r"^the ByT5Tokenizer writes no tokenizer\.json"):
        castalia.load_model(folder, tokenizer=words)


def test_an_object_of_an_unknown_architecture_is_refused_by_its_name() -> None:
    from transformers import CTRLConfig, CTRLLMHeadModel

    other = CTRLLMHeadModel(CTRLConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=1, dff=8, n_positions=8))
    with pytest.raises(CheckpointError, match=r"^the CTRLLMHeadModel.*model_type 'ctrl'.*is not supported"):
        castalia.load_model(other)


def test_a_model_object_is_trained_as_its_folder_is_and_has_the_trained_weights(corpus, tmp_path, capfd) -> None:
    theirs = small()
    theirs.save_pretrained(tmp_path / "hf")
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    capfd.readouterr()
    words = {"data": {"path": corpus, "seq_length": 16}, "train": {"steps": 3, "batch_size": 4}}
    words |= {"optimizer": {"lr": 0.01}, "precision": {"compute": "fp32"}}
    config = castalia.load_config([words], [f"checkpoint.dir={tmp_path / 'object'}"])
    run = castalia.run_training(config, theirs)
    assert capfd.readouterr() == ("", "")
    assert run == tmp_path / "object" and (run / "header.txt").read_text()
    path = castalia.load_config(
        [words], [f"checkpoint.dir={tmp_path / 'path'}", f"checkpoint.init_from={tmp_path / 'hf'}"]
    )
    expected = castalia.open_checkpoint(castalia.run_training(path))
    state = theirs.state_dict()
    assert not any(torch.equal(before[name], value) for name, value in state.items())
    for name in ("gpt_neox.embed_in.weight", "gpt_neox.layers.1.attention.query_key_value.weight"):
        assert torch.equal(state[name], expected[name].read())
    with pytest.raises(ConfigError, match="are two models to begin with; give one"):
        castalia.run_training(path, theirs)
    with pytest.raises(ConfigError, match="nowhere"):
        castalia.run_training(
            castalia.load_config([words], ["data.path=nowhere", f"checkpoint.dir={tmp_path / 'x'}"]), theirs
        )
    assert not (tmp_path / "x").exists()


def test_steps_of_batches_are_counted_from_one(corpus) -> None:
    words = {"data": {"path": corpus, "seq_length": 16}, "train": {"steps": 3, "batch_size": 4}}
    model = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "vocab_size": 64}
    config = castalia.load_config([words | {"model": model}])
    assert castalia.batch_at(config, 1).tokens.shape == (4, 16)
    with pytest.raises(DataError, match="there is no step 0: a run's first step is 1"):
        castalia.batch_at(config, 0)
