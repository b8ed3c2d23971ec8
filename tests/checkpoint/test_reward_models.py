"""Reward models to and from transformers' AutoModelForSequenceClassification and PEFT: one number, the same in both."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import Checkpoint
from castalia.cli.merge_lora import command as merge
from castalia.config.schema import ModelConfig
from castalia.errors import CheckpointError
from castalia.examine.verify import verify
from castalia.language_model import load_model
from castalia.loading import build_model
from castalia.model.transformer import Transformer
from tests.checkpoint.made import FAMILIES, assert_same, made, written

TOKENS = torch.arange(40).view(2, 20) % 90
KINDS = ("gpt_neox", "gpt_neox sequential tied", "gpt2", "llama", "llama with biases", "mistral")


def rewards(model: Transformer) -> torch.Tensor:
    """Of both sequences, at their last tokens: [2, 1]."""
    labels = torch.full_like(TOKENS, -100)
    labels[:, -1] = 0
    with torch.no_grad():
        return model(TOKENS, labels, per_sequence=True)[:, None]


def rewards_of_transformers(model: torch.nn.Module) -> torch.Tensor:
    model.config.pad_token_id = -1  # so that it takes several sequences, of which none has such a token
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def reward_model(kind: str) -> Checkpoint:
    return made(FAMILIES[kind].with_({"reward_head": True}), optimizer=False)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_rewards(kind: str, tmp_path: Path) -> None:
    source = reward_model(kind)
    again = written(source, tmp_path / "out", "hf")
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    assert model.config.num_labels == 1
    expected = rewards(build_model(source))
    assert expected.abs().max() > 0.1
    assert torch.allclose(rewards_of_transformers(model), expected, atol=1e-5)
    assert_same(source, again)
    assert verify(source, again).holds


@pytest.mark.parametrize("kind", KINDS)
def test_reward_models_of_transformers_are_read(kind: str, tmp_path: Path) -> None:
    written(reward_model(kind), tmp_path / "ours", "hf")
    torch.manual_seed(1)
    theirs = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path / "ours"))
    theirs.score.weight.data.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.cfg.reward_head
    assert torch.allclose(rewards(model), rewards_of_transformers(theirs), atol=1e-5)


def test_classifiers_are_refused_by_name(tmp_path: Path) -> None:
    written(reward_model("llama"), tmp_path / "ours", "hf")
    config = AutoConfig.from_pretrained(tmp_path / "ours", num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="score.weight has 3 rows, so that this model sorts texts into classes"):
        open_checkpoint(tmp_path / "theirs")


def adapters_of_peft(base: Path, folder: Path, **settings: object) -> torch.Tensor:
    """Saves adapters of a reward model on a language model, as TRL's RewardTrainer does; gives its rewards."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, attn_implementation="eager")
    config = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **settings)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(folder)
    return rewards_of_transformers(wrapped)


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama"])
def test_adapters_of_reward_models_are_read_merged_and_written(kind: str, tmp_path: Path) -> None:
    written(made(FAMILIES[kind], optimizer=False), tmp_path / "base", "hf")
    expected = adapters_of_peft(tmp_path / "base", tmp_path / "adapter", r=3)
    assert torch.allclose(rewards(load_model(tmp_path / "adapter")), expected, atol=1e-5)
    merge(str(tmp_path / "adapter"), tmp_path / "merged", verify=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert torch.allclose(rewards_of_transformers(merged), expected, atol=1e-5)
    written(open_checkpoint(tmp_path / "adapter", adapters=True), tmp_path / "again", "peft")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, attn_implementation="eager"
    )
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "again")
    assert torch.allclose(rewards_of_transformers(wrapped), expected, atol=1e-5)


def test_adapters_without_the_head_they_need_are_refused(tmp_path: Path) -> None:
    written(made(FAMILIES["llama"], optimizer=False), tmp_path / "base", "hf")
    peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), peft.LoraConfig(task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("CAUSAL_LM", "SEQ_CLS"))
    with pytest.raises(CheckpointError, match="score.weight: it was not saved"):
        open_checkpoint(tmp_path / "adapter")


def test_other_formats_say_that_they_have_no_place_for_a_reward_head(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="reward"):
        written(made(ModelConfig(**FAMILIES["gpt_neox"].model_dump() | {"reward_head": True})), tmp_path / "x", "neox")
