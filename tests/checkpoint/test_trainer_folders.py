"""The folders of TRL's trainers, checkpoint-1, checkpoint-2, ...: they open here, and are trained on."""

from __future__ import annotations

import logging
from pathlib import Path

import peft
import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from castalia.checkpoint.opener import find_folder, find_steps, open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.cli.finetune import command as finetune
from castalia.errors import CheckpointError
from castalia.language_model import load_model
from castalia.loading import build_model
from tests.cli.chat_model import conversation, make_chat_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module", params=["full", "lora"])
def folder(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of SFT, each of which is saved."""
    out = tmp_path_factory.mktemp(request.param)
    options = trl.SFTConfig(
        str(out), max_steps=2, save_steps=1, learning_rate=0.01, use_cpu=True, bf16=False, report_to=[],
        per_device_train_batch_size=2, logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trl.SFTTrainer(
        str(base),
        options,
        train_dataset=Dataset.from_list([{"messages": conversation(2)}] * 4),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=peft.LoraConfig(r=4) if request.param == "lora" else None,
    ).train()
    return out


def logits(step: Path, base: Path, tokens: torch.Tensor) -> torch.Tensor:
    """By transformers, and PEFT where the folder holds adapters."""
    adapters = (step / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(base if adapters else step, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(step)) if adapters else model
    with torch.no_grad():
        return model.eval()(tokens).logits


def test_each_step_opens_and_computes_the_same(folder: Path, base: Path) -> None:
    tokens = torch.arange(12)[None]
    assert list(find_steps(folder)) == [1, 2]
    for step in (1, 2):
        checkpoint = open_checkpoint(folder, step=step)
        assert checkpoint.progress.step == step
        if (folder / "checkpoint-2" / "adapter_config.json").is_file():
            assert checkpoint.optimizer is None and "optimizer.pt is not read" in checkpoint.state_notes[0]
        else:
            assert {state["step"] for state in checkpoint.optimizer.values()} == {step}
            assert not checkpoint.state_notes
            assert checkpoint.progress.schedule["decay_style"] == "linear"
            assert (checkpoint.progress.schedule["start_lr"], checkpoint.progress.schedule["end_iter"]) == (0.01, 2)
        with torch.no_grad():
            found = build_model(checkpoint)(tokens)
        assert torch.allclose(found, logits(folder / f"checkpoint-{step}", base, tokens), atol=1e-4)
    latest = open_checkpoint(folder)
    assert latest.path == str(folder / "checkpoint-2")
    words = load_tokenizer_for(latest)
    assert words.folder.template and [words.token(end) for end in words.end_ids] == ["<|im_end|>"]


def test_a_step_that_is_not_complete_is_passed_over(folder: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        for file in (folder / "checkpoint-1").iterdir():
            (place / file.name).symlink_to(file)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert find_folder(tmp_path).name == "checkpoint-1"
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match="there are checkpoint-1, checkpoint-2"):
        find_folder(tmp_path)


def test_training_goes_on_from_it(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ['{"text": "Adam was the first of them all."}'] * 4
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    run = tmp_path / "run"
    words = [f"data.train={tmp_path / 'texts.jsonl'}", "train.steps=2", f"checkpoint.dir={run}", "log.peak_tflops=0.1"]
    with caplog.at_level(logging.WARNING):
        finetune(str(folder), words, full=not (folder / "checkpoint-2" / "adapter_config.json").is_file())
    assert open_checkpoint(run).progress.step == 2
    load_model(run)
