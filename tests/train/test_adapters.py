"""Fine-tuning parts of a model: what is frozen stays, what trains goes on bit for bit, new tokens begin well."""

from __future__ import annotations

import re

import pytest
import torch

from castalia.checkpoint.file_plan import WriteOptions
from castalia.checkpoint.formats.peft import write as peft_write
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.load import load_config, load_run
from castalia.config.schema import TokenizerConfig
from castalia.data.tokenizer import load_tokenizer, train_bpe
from castalia.errors import CheckpointError, ConfigError, DataError
from castalia.examine.inspect import report
from castalia.language_model import load_model
from castalia.loading import build_model
from castalia.observe.metrics import read_metrics
from castalia.train.loop import train
from castalia.train.setup import start

LORA = ["finetune.lora.rank=4", "finetune.lora.dropout=0.2", "model.hidden_dropout=0.1"]


@pytest.fixture(scope="module")
def tune(tiny, straight):
    """A function: folder and overrides -> config of a run that begins from the weights of `straight`."""

    def config(folder, *overrides):
        return tiny(folder, f"checkpoint.init_from={straight}", *overrides)

    return config


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: ref.read() for name, ref in checkpoint.model.items()}


def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])}


def test_adapters_alone_train_and_begin_without_effect(tune, straight, tmp_path):
    before = values(open_checkpoint(straight))
    session = start(tune(tmp_path / "run", *LORA))
    names = set(session.executor.parameters)
    trained = {name for name, parameter in session.executor.parameters.items() if parameter.requires_grad}
    assert trained == {name for name in names if "lora" in name} and len(trained) == 2 * 4 * 2
    assert len(session.optimizer.state) == len(trained)
    loaded = load_model(straight)
    model = session.executor.models[0].eval()
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens), loaded(tokens))
    model.train()
    session.step(0, session.batch(0))
    session.step(1, session.batch(1))
    after = {name: parameter.detach() for name, parameter in session.executor.parameters.items()}
    assert moved(before, after) == set()
    assert all(after[name].abs().max() > 0 for name in trained)
    assert all(parameter.grad is None for parameter in session.executor.parameters.values())


def test_a_stopped_run_with_adapters_goes_on_bit_for_bit(tune, tmp_path):
    """Dropout of the model and of the adapters included."""
    common = [*LORA, "precision.compute=bf16"]
    straight = train(tune(tmp_path / "one", *common))
    folder = train(tune(tmp_path / "two", *common, "train.exit_interval=7"))
    train(load_run(folder, ["train.exit_interval=null"]))
    assert [row["loss"] for row in read_metrics(folder)] == [row["loss"] for row in read_metrics(straight)]
    one, two = (open_checkpoint(path, adapters=True) for path in (straight, folder))
    assert moved(values(one), values(two)) == set()
    for name, state in one.optimizer.items():
        assert "lora" in name and torch.equal(state["exp_avg"].read(), two.optimizer[name]["exp_avg"].read())


def test_what_is_computed_again_drops_what_was_dropped(tune, tmp_path):
    """Without dropout of the model's own."""
    found = []
    for how in ("none", "selective", "full"):
        session = start(
            tune(tmp_path / how, "finetune.lora.rank=4", "finetune.lora.dropout=0.5", f"train.recompute={how}")
        )
        found.append([tuple(session.step(number, session.batch(number))) for number in (0, 1)])
    assert found[0] == found[1] == found[2] and found[0][1][0] > 0


def test_a_run_with_adapters_opens_as_one_plain_model(tune, tmp_path):
    run = train(tune(tmp_path / "run", "finetune.lora.rank=4", 'finetune.lora.targets=["attn.qkv", "head"]'))
    plain = open_checkpoint(run)
    assert not any("lora" in name for name in plain.model) and plain.optimizer is None
    assert plain.config.finetune.lora is None
    session = start(load_run(run))
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        expected = session.executor.models[0].eval()(tokens)
        assert torch.allclose(build_model(plain)(tokens), expected, atol=1e-5)
    matrix = "blocks.1.attn.qkv.weight"
    whole = plain.model[matrix].read()
    assert torch.equal(plain.model[matrix].read([slice(5, 9), slice(3, 30)]), whole[5:9, 3:30])


KINDS = {
    "mamba": ["model.pattern=[mamba]", "model.norm=rmsnorm"],
    "rwkv": ["model.pattern=[rwkv]", "model.position=none"],
    "gmlp and amlp": ["model.pattern=[gmlp, amlp]", "model.amlp_size=8", "model.max_positions=16"],
}
MATRICES = {"mamba": 2 * 5, "rwkv": 2 * 8, "gmlp and amlp": 2 + 4}  # linear maps of two blocks


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "mamba")) for kind in KINDS])
def test_adapters_on_blocks_without_attention(tiny, tmp_path, kind):
    """They alone train and begin without effect, a stopped run goes on bit for bit, and merged they are one model."""
    base = train(tiny(tmp_path / "base", *KINDS[kind], "train.steps=2", "eval.every=null"))
    more = [*KINDS[kind], "train.steps=4", "eval.every=null", f"checkpoint.init_from={base}", "finetune.lora.rank=4"]
    session = start(tiny(tmp_path / "begun", *more))
    trained = {name for name, parameter in session.executor.parameters.items() if parameter.requires_grad}
    assert len(trained) == 2 * MATRICES[kind] and all("lora" in name for name in trained)
    tokens, model = torch.arange(16)[None], session.executor.models[0].eval()
    with torch.no_grad():
        assert torch.equal(model(tokens), load_model(base)(tokens))
    whole = train(tiny(tmp_path / "whole", *more, "finetune.lora.dropout=0.2"))
    stopped = train(tiny(tmp_path / "stopped", *more, "finetune.lora.dropout=0.2", "train.exit_interval=2"))
    train(load_run(stopped, ["train.exit_interval=null"]))
    one, two = (open_checkpoint(path, adapters=True) for path in (whole, stopped))
    assert moved(values(one), values(two)) == set()
    assert moved(values(open_checkpoint(base)), values(one)) == set()
    assert all(one.model[name].read().abs().max() > 0 for name in trained)
    model = start(load_run(whole)).executor.models[0].eval()
    with torch.no_grad():
        assert torch.allclose(build_model(open_checkpoint(whole))(tokens), model(tokens), atol=1e-5)
    with pytest.raises(CheckpointError, match="no Hugging Face class|neither read nor written in PEFT's layout"):
        peft_write.plan(one, WriteOptions())


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (['finetune.train=["^head"]'], r"^head\."),
        (['finetune.train=["norm"]', 'finetune.freeze=["bias"]'], r"norm.*weight"),
        (['finetune.freeze=["^embed", "^blocks.0"]'], r"^(?!embed|blocks\.0)"),
        (['finetune.train=["^embed"]', "finetune.lora={}"], r"^embed|lora"),
    ],
    ids=["head", "norms", "freeze", "embedding and adapters"],
)
def test_patterns_say_what_trains(tune, straight, tmp_path, words, pattern):
    session = start(tune(tmp_path / "run", *words, "optimizer.weight_decay=0"))
    parameters = session.executor.parameters
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for step in range(2):
        session.step(step, session.batch(step))
    changed = moved(before, dict(parameters))
    assert changed and all(re.search(pattern, name) for name in changed)
    assert {name for name in parameters if re.search(pattern, name)} == changed


def test_lower_blocks_learn_more_slowly(tune, tmp_path):
    session = start(tune(tmp_path / "run", "optimizer.layer_decay=0.5"))
    scale = {id(p): group["lr_scale"] for group in session.optimizer.param_groups for p in group["params"]}
    rates = {name: scale[id(parameter)] for name, parameter in session.executor.parameters.items()}
    assert rates["head.weight"] == rates["norm.weight"] == rates["blocks.1.mlp.up.weight"] == 1.0
    assert rates["blocks.0.attn.out.bias"] == 0.5 and rates["embed.weight"] == 0.25


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A run with a BPE vocabulary, and its corpus."""
    from castalia.data.prepare import Recipe, prepare

    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text("in the beginning was the word " * 60)
    train_bpe([(folder / "text.txt").read_text()], 300).save(folder)
    tokenizer = TokenizerConfig(path=str(folder / "tokenizer.json"))
    prepare([folder / "text.txt"], folder / "corpus", Recipe(tokenizer))
    config = load_config(
        [{
            "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_multiple": 2},
            "tokenizer": {"path": tokenizer.path},
            "data": {"train": [str(folder / "corpus_text_document")], "seq_length": 16},
            "train": {"steps": 2, "batch_size": 4}, "precision": {"compute": "fp32"}, "log": {"peak_tflops": 0.1},
            "checkpoint": {"dir": str(folder / "run")},
        }]
    )  # fmt: skip
    train(config)
    return folder, config


def test_new_tokens_begin_as_the_mean_of_all_others(words, tmp_path):
    folder, config = words
    known = open_checkpoint(folder / "run")
    old = known.config.model.vocab_size
    checkpoint = config.checkpoint.model_copy(update={"init_from": str(folder / "run"), "dir": str(tmp_path / "run")})
    finetune = config.finetune.model_copy(update={"add_tokens": ("<|user|>", "<|bot|>", "<|end|>")})
    tuned = config.model_copy(update={"model": None, "finetune": finetune, "checkpoint": checkpoint})
    session = start(tuned)
    assert session.config.model.vocab_size == old + 3
    for name in ("embed.weight", "head.weight"):
        rows, stored = session.executor.parameters[name].detach(), known.model[name].read()
        assert torch.equal(rows[:old], stored[:old])
        assert torch.allclose(rows[old : old + 3], stored[:old].mean(dim=0).expand(3, -1), atol=1e-7)
    run = train(tuned)
    tokenizer = load_tokenizer_for(open_checkpoint(run))
    ids = tokenizer.encode("the word<|end|>")
    assert ids[-1] == old + 2 and tokenizer.decode(ids) == "the word<|end|>"
    again = start(load_run(run))  # nothing is new any more
    assert torch.equal(
        again.executor.parameters["embed.weight"].detach(), open_checkpoint(run).model["embed.weight"].read()
    )


def test_a_tokenizer_of_bytes_takes_no_tokens(tune, tmp_path):
    with pytest.raises(DataError, match=r"a bytes vocabulary takes no further tokens \(<x>\)"):
        start(tune(tmp_path / "run", 'finetune.add_tokens=["<x>"]'))
    assert load_tokenizer(TokenizerConfig(kind="bytes")).vocab_size == 257


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (['finetune.train=["mlp.gate"]'], ConfigError, "finetune.train: 'mlp.gate' matches no tensor; there are embed"),
        (['finetune.freeze=["."]'], ConfigError, "leave nothing that trains"),
        (['finetune.lora.targets=["mlp.gate"]'], ConfigError, "the model has no mlp.gate; it has attn.qkv"),
        (["finetune.lora={}", "checkpoint.init_from=null"], ConfigError, "adapts a model .*checkpoint.init_from"),
    ],
)
def test_what_cannot_be_is_refused(tune, tmp_path, overrides, error, words):
    with pytest.raises(error, match=words):
        start(tune(tmp_path / "run", *overrides))


def test_inspection_tells_of_the_adapters(tune, tmp_path):
    run = train(tune(tmp_path / "run", "finetune.lora.rank=2", "train.steps=1"))
    found = report(open_checkpoint(run, adapters=True))
    assert "a complete float32 + Adam checkpoint" in found["meaning"] and "adapters of rank 2" in found["meaning"]
    assert found["statistics"][0]["kind"] == "adapters" and found["statistics"][0]["tensors"] == 16


def test_adapters_that_are_there_already_must_be_those_of_the_config(tune, tmp_path):
    run = train(tune(tmp_path / "run", "finetune.lora.rank=2", "train.steps=1"))
    more = tune(tmp_path / "more", f"checkpoint.init_from={run}")
    session = start(more)
    saved = open_checkpoint(run, adapters=True)
    name = "blocks.0.attn.qkv.lora_a"
    assert torch.equal(session.executor.parameters[name].detach(), saved.model[name].read())
    with pytest.raises(CheckpointError, match="has adapters already.*merge-lora"):
        start(tune(tmp_path / "more", f"checkpoint.init_from={run}", "finetune.lora.rank=3"))
