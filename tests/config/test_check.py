"""Contradictions between values, and values without effect, are told with their places."""

from __future__ import annotations

import pytest

from castalia.config.check import require_training
from castalia.config.load import load_config
from castalia.errors import ConfigError

MODEL = ["model.num_layers=4", "model.hidden_size=64", "model.num_heads=4", "model.vocab_size=430"]
BATCHES = ["train.batch_size=16", "train.batch_size_warmup.steps=9"]
LENGTHS = ["data.seq_length_warmup.steps=9"]

CONTRADICTIONS = [
    (["model.num_heads=5"], "model.hidden_size=64 does not divide into model.num_heads=5 heads; use 60 or 65"),
    (["model.num_kv_heads=3"], "model.num_kv_heads=3 does not divide model.num_heads=4; use one of 1, 2, 4"),
    (["model.rotary_pct=0.2"], "rotates 3 dimensions, but they rotate in pairs; model.rotary_pct=0.25 rotates 4"),
    (["model.max_positions=64", "data.seq_length=128"], "data.seq_length=128 is longer than model.max_positions=64"),
    (["parallel.gpus=6", "parallel.tp=4"], "parallel.gpus=6 does not divide by tp * pp * cp = 4 * 1 * 1; 4 would"),
    (["parallel.tp=3"], "parallel.tp=3 does not divide model.num_heads=4; use one of 1, 2, 4"),
    (["parallel.tp=4", "model.num_kv_heads=2"], "parallel.tp=4 does not divide model.num_kv_heads=2"),
    (["parallel.tp=4", "model.mlp_size=6"], "parallel.tp=4 does not divide model.mlp_size=6"),
    (["parallel.tp=4", "model.vocab_multiple=1"], "the vocabulary's 430 rows; model.vocab_multiple=4 fits"),
    (
        ["model.experts.count=4", "model.experts.top_k=5"],
        "model.experts.top_k=5 is more than model.experts.count=4; lower it",
    ),
    (["model.experts.count=4", "model.experts.first=4"], "leaves no block with experts: there are 4; lower it"),
    (["model.experts.count=4", "model.experts.norm_topk=true"], "so that its router learns nothing"),
    (
        ["model.experts.count=4", "model.experts.shared_width=6", "parallel.tp=4"],
        "parallel.tp=4 does not divide model.experts.shared_width=6",
    ),
    (["parallel.expert=2"], "parallel.expert=2 shares out experts, of which the model has none"),
    (
        ["model.experts.count=4", "parallel.expert=3"],
        "parallel.expert=3 does not divide model.experts.count=4; use",
    ),
    (["model.experts.count=4", "parallel.expert=2", "parallel.tp=2"], "would both share out the experts; set one"),
    (
        ["model.experts.count=4", "parallel.expert=2", "parallel.pp=2", "parallel.pipeline=zero-bubble"],
        "parallel.expert=2: tokens cannot travel back in the halves of a backward pass",
    ),
    (
        ["model.experts.count=4", "train.compile=true", "train.recompute=full"],
        "two graphs when compiled, which cannot be computed again together; set train.compile=false",
    ),
    (["model.experts.count=4", "model.mup.base_width=8"], "model.mup has no rates for the matrices of"),
    (["model.experts.count=6", "parallel.tp=4"], "parallel.tp=4 does not divide model.experts.count=6; use one of"),
    (
        ["model.experts.count=4", "model.experts.jitter=0.1", "parallel.tp=2"],
        "draw different numbers for model.experts.jitter",
    ),
    (["parallel.pp=5"], "parallel.pp=5 is more than model.num_layers=4"),
    (
        ["parallel.tp=4", "parallel.sequence_parallel=true", "data.seq_length=30"],
        "does not split over 4 context and sequence-parallel ranks; use 32",
    ),
    (["train.batch_size=10", "train.micro_batch_size=4"], "8 or 12 would fit"),
    (["train.batch_size=8", "train.micro_batch_size=4", "parallel.gpus=4"], "does not divide into"),
    (["schedule.min_lr=1", "optimizer.lr=0.5"], "schedule.min_lr=1 is above optimizer.lr=0.5"),
    (["optimizer.betas=[0.9, 1.0]"], "both must be at least 0 and below 1"),
    (["model.mup.base_width=32", "optimizer.name=muon"], "model.mup has no rates for optimizer.name=muon"),
    (["model.mup.base_width=32", "model.init_method=xavier_normal"], "model.init_method=xavier_normal has its own"),
    (["log.profile.start=9", "log.profile.stop=8"], "log.profile.stop=8 is before log.profile.start=9"),
    (["optimizer.groups=[{match: 'a('}]"], "optimizer.groups: 'a(' is not a valid regular expression"),
    (["schedule.style=wsd", "schedule.warmup=0.5", "schedule.cooldown=0.6"], "are more than the whole"),
    (["neox_exact=true", "schedule.style=wsd"], "neox_exact: GPT-NeoX has no schedule.style=wsd"),
    (["neox_exact=true", "schedule.warmup_steps=5"], "neox_exact: GPT-NeoX has no schedule.warmup_steps"),
    (["data.packing=unpacked", "data.train=[corpus]"], "needs labels in every source of data.train"),
    ([*LENGTHS, "data.seq_length_warmup.start=4096"], "data.seq_length_warmup.start=4096 must lie between"),
    (
        [*LENGTHS, "data.seq_length_warmup.start=8", "data.seq_length_warmup.multiple=16"],
        "must lie between its multiple, 16, and",
    ),
    ([*LENGTHS, "data.seq_length_warmup.start=8", "parallel.pp=2"], "which parallel.pp does not; set it to 1"),
    ([*LENGTHS, "data.seq_length_warmup.start=8", "parallel.cp=2"], "which parallel.cp does not; set it to 1"),
    (
        [*LENGTHS, "data.seq_length_warmup.start=6", "parallel.tp=4", "parallel.sequence_parallel=true"],
        "multiples of 6, do not divide by parallel.tp=4",
    ),
    ([*BATCHES, "train.batch_size_warmup.start=32"], "train.batch_size_warmup.start=32 must lie between"),
    ([*BATCHES, "train.batch_size_warmup.start=4", "train.accumulation=2"], "and not train.accumulation"),
    ([*BATCHES, "train.batch_size_warmup.start=4", "parallel.pp=2"], "a pipeline's schedule is made for"),
    ([*BATCHES, "train.batch_size_warmup.start=4", "neox_exact=true"], "GPT-NeoX has no train.batch_size_warmup"),
    ([*BATCHES, "train.batch_size_warmup.start=4", "parallel.gpus=8"], "and be a multiple of 8 data-parallel ranks"),
    ([*BATCHES, "train.batch_size_warmup.start=6", "parallel.gpus=2"], "6 sequences, must divide train.batch_size=16"),
    (["generate.mode=input-file"], "generate.mode=input-file needs generate.input_file"),
    (["parallel.dp_replicate=2"], "parallel.dp_replicate=2 needs parallel.zero of 1, 2 or 3, which is not set"),
    (["parallel.pipeline=gpipe"], "parallel.pipeline=gpipe needs parallel.pp of 2 or more, which is not set"),
    (["parallel.stages_per_rank=1"], "parallel.stages_per_rank=1 needs parallel.pp of 2 or more"),
    (["parallel.cp_kind=ring"], "parallel.cp_kind=ring needs parallel.cp of 2 or more"),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config([], [*MODEL, *overrides])
    assert [line for line in str(error.value).splitlines() if message in line and line.startswith("command line: ")]


def test_all_contradictions_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        load_config([], [*MODEL, "model.num_heads=5", "parallel.pp=9", "schedule.min_lr=1"])
    assert len(str(error.value).splitlines()) == 3


NOTES = [
    (["model.shared_norm=true"], "model.shared_norm has no effect: no parallel_residual"),
    (["model.rotary_pct=0.25", "model.position=learned"], "model.rotary_pct has no effect"),
    (["parallel.sequence_parallel=true"], "parallel.sequence_parallel has no effect: parallel.tp is 1"),
    (["parallel.dp_replicate=2", "parallel.zero=0"], "parallel.dp_replicate has no effect: parallel.zero is 0"),
    (["parallel.pipeline=gpipe", "parallel.pp=1"], "parallel.pipeline has no effect: parallel.pp is 1"),
    (["parallel.stages_per_rank=1", "parallel.pp=1"], "parallel.stages_per_rank has no effect: parallel.pp is 1"),
    (["data.train=[a]", "data.split='1,0,0'"], "data.split has no effect: data.train is given"),
    (["data.train=[a]", "eval.every=5"], "eval.every has no effect: data.valid is empty"),
    (["optimizer.name=lion", "optimizer.eps=1e-9"], "optimizer.eps has no effect: lion has none"),
    (["optimizer.name=adafactor", "optimizer.betas=[0.9,0.9]"], "optimizer.betas has no effect: adafactor has none"),
    (["optimizer.momentum=0.5"], "optimizer.momentum has no effect: adamw has none"),
    (["schedule.warmup=0.5", "schedule.warmup_steps=5"], "schedule.warmup has no effect: schedule.warmup_steps"),
    (["schedule.cooldown=0.5"], "schedule.cooldown has no effect: schedule.style is cosine"),
    (["checkpoint.step=5"], "checkpoint.step has no effect: nothing is loaded"),
    (["schedule.decay_steps=50", "schedule.decay_fraction=0.5"], "schedule.decay_fraction has no effect"),
    (["checkpoint.init_from=a", "checkpoint.dir=a"], "a folder of its own for the new run"),
]


@pytest.mark.parametrize(("overrides", "message"), NOTES)
def test_values_without_effect_are_told(overrides, message):
    assert any(message in note for note in load_config([], [*MODEL, *overrides]).notes)


def test_a_plain_config_has_no_notes():
    config = load_config([], [*MODEL, "train.steps=1000", "data.path=corpus", "checkpoint.dir=runs/a"])
    assert config.notes == ()


def test_training_names_everything_that_is_missing():
    with pytest.raises(ConfigError) as error:
        require_training(load_config([]))
    for part in ("no model", "no end", "no data", "no batch"):
        assert part in str(error.value)
    require_training(load_config([], [*MODEL, "train.steps=1000", "data.path=corpus", "train.batch_size=4"]))
