"""A config in NeoX's keys says there what it says here."""

from __future__ import annotations

from pathlib import Path

import pytest

from castalia.config.load import load_config, preset_names
from castalia.config.neox.write import lost, to_neox
from castalia.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    Warmup,
)
from castalia.errors import ConfigError

SMALL = ModelConfig(num_layers=2, hidden_size=64, num_heads=4, max_positions=2048)
COMPLETE = [
    "1-3B", "125M", "20B", "350M", "finetuning_configs_6-9B", "pythia_1-4B", "pythia_12B", "pythia_14M", "pythia_70M",
    "slurm_125M",
]  # fmt: skip


@pytest.mark.parametrize("name", COMPLETE)
def test_public_configs_come_back(fixtures: Path, name: str) -> None:
    config = load_config(fixtures / "configs" / f"{name}.yml")
    assert lost(config, to_neox(config)) == {}


@pytest.mark.parametrize("name", preset_names())
def test_presets_come_back(name: str) -> None:
    config = load_config(name)
    assert lost(config, to_neox(config)) in ({}, {"precision.compute": "auto"})  # NeoX has no "auto"


@pytest.mark.parametrize(
    ("section", "value", "path"),
    [
        ("model", SMALL.model_copy(update={"activation": "sigmoid"}), "model.activation"),
        ("model", SMALL.model_copy(update={"gated_mlp": True, "activation": "gelu_tanh"}), "model.activation"),
        ("model", SMALL.model_copy(update={"embedding_dropout": 0.1}), "model.embedding_dropout"),
        ("model", SMALL.model_copy(update={"vocab_multiple": 3}), None),
        ("schedule", ScheduleConfig(style="wsd"), "schedule.style"),
        ("data", DataConfig(mask_documents=True), "data.mask_documents"),
        ("data", DataConfig(seq_length_warmup=Warmup(start=16, steps=9, multiple=8, root=2)), None),
        (
            "train",
            TrainConfig(batch_size=8, batch_size_warmup=Warmup(start=2, steps=9)),
            "train.batch_size_warmup.start",
        ),
        ("optimizer", OptimizerConfig(clip_norm=None), None),
    ],
)
def test_what_has_no_key_is_named(section: str, value: object, path: str | None) -> None:
    config = load_config([{"model": SMALL.model_dump(), "precision": {"compute": "fp32"}}])
    config = config.model_copy(update={section: value})
    missing = lost(config, to_neox(config))
    assert path in missing if path else missing == {}


def test_keys_that_contradict_each_other_do_not_load() -> None:
    config = RunConfig(model=SMALL.model_copy(update={"max_positions": 16}))
    with pytest.raises(ConfigError, match=r"data\.seq_length=2048 is longer"):
        lost(config, to_neox(config))
