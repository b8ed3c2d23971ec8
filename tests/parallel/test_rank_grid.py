"""What cannot be split is refused, with the reason and the nearest that works."""

from __future__ import annotations

import pytest

from castalia.cli.main import main
from castalia.config.load import dump_config
from castalia.config.schema import ParallelConfig
from castalia.errors import ConfigError
from castalia.parallel.rank_grid import RankGrid, check_run, layout

EXPERTS = ["model.experts.count=4"]


@pytest.mark.parametrize(
    "world, parallel, expected",
    [
        (8, ParallelConfig(tp=2, pp=2), RankGrid(2, 2, 1, 1, 2)),
        (8, ParallelConfig(tp=2, pp=2, zero=1), RankGrid(2, 1, 2, 1, 2)),
        (96, ParallelConfig(tp=2, pp=4, zero=1), RankGrid(4, 1, 12, 1, 2)),
        (8, ParallelConfig(zero=3, dp_replicate=2, cp=2), RankGrid(1, 2, 2, 2, 1)),
        (8, ParallelConfig(expert=4), RankGrid(1, 8, 1, 1, 1, 4)),
    ],
)
def test_the_grid(world, parallel, expected):
    assert layout(parallel, world) == expected
    assert expected.world == world


@pytest.mark.parametrize(
    "world, overrides, message",
    [
        (6, ["parallel.tp=2", "parallel.pp=2"], "6 processes cannot hold .* multiple of 4; start 4 or 8"),
        (4, ["parallel.zero=2", "parallel.dp_replicate=3"], r"dp_replicate=3 does not divide the 4 .* 1, 2, 4"),
        (
            4,
            ["parallel.pp=4", "parallel.pipeline=interleaved"],
            "pp=4 x 2 stages is more than model.num_layers=4.* use parallel.pp <= 2",
        ),
        (
            2,
            ["parallel.pp=2", "parallel.stages_per_rank=2"],
            "stages_per_rank=2 does not suit parallel.pipeline=1f1b; use 1",
        ),
        (
            2,
            ["parallel.pp=2", "parallel.pipeline=zero-bubble", "parallel.stages_per_rank=1"],
            "stages_per_rank=1 does not suit parallel.pipeline=zero-bubble; use 2",
        ),
        (
            2,
            ["parallel.pp=2", "parallel.pipeline=interleaved", "train.batch_size=15", "train.accumulation=5"],
            "accumulation=5 micro-batches do not suit parallel.pipeline=interleaved, .* use 4 or 6",
        ),
        (
            2,
            ["parallel.pp=2", "parallel.pipeline=zero-bubble", "train.accumulation=2"],
            "accumulation=2 micro-batches are too few for parallel.pipeline=zero-bubble .* at least 4",
        ),
        (4, ["parallel.expert=2"], "parallel.expert=2 shares out experts, of which the model has none"),
        (
            3,
            [*EXPERTS, "parallel.expert=2", "train.batch_size=12"],
            "=2 cannot be taken from 3 .*; use one of 1, or 1 times one of 1, 3$",
        ),
        (
            6,
            [*EXPERTS, "parallel.zero=1", "parallel.dp_replicate=2", "parallel.expert=2"],
            "taken from 6 data and context ranks, of which 3 share .*; use one of 1, 3, or 3 times one of 1, 2$",
        ),
        (3, ["parallel.cp=3"], "data.seq_length=16 does not split over 3 .* use 18"),
        (8, ["parallel.cp=8", "data.seq_length=12"], "data.seq_length=12 does not split over 8 .* use 16"),
        (3, ["parallel.cp=3", "parallel.cp_kind=ulysses", "data.seq_length=15"], "4 on each tensor rank; use one of"),
        (
            2,
            ["parallel.cp=2", "parallel.cp_kind=ulysses", "model.position=alibi"],
            "position=alibi does not; use gather",
        ),
        (
            2,
            ["parallel.cp=2", "parallel.cp_kind=ring", "model.sliding_window=4"],
            "sliding_window=4 does not; use gather",
        ),
        (
            2,
            ["parallel.cp=2", "parallel.cp_kind=ring", "model.attention_dropout=0.1"],
            "ring has no model.attention_dropout=0.1",
        ),
        (
            2,
            ["parallel.cp=2", "data.mask_documents=true"],
            "data.mask_documents needs whole sequences .* parallel.cp=1",
        ),
        (2, ["parallel.tp=2", "train.compile=true", "model.attention_dropout=0.1"], "train.compile makes one graph"),
        (2, ["parallel.tp=2", "model.qk_norm=true"], "model.qk_norm=true is one norm over all heads.* use tp=1"),
        (2, ["optimizer.name=muon"], "optimizer.name=muon looks at whole matrices.* use adamw, lion or sgd"),
        (3, ["train.batch_size=16"], "train.batch_size=16 does not divide into .*3 data-parallel ranks"),
    ],
)
def test_refused_before_anything_is_allocated(tiny, world, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_run(tiny("neox-parallel", *overrides), world)


def test_config_check_refuses_what_the_named_devices_cannot_hold(tiny, tmp_path, monkeypatch, capsys):
    path = tmp_path / "c.yml"
    path.write_text(dump_config(tiny("neox-parallel", "parallel.tp=2", "parallel.gpus=2", "model.qk_norm=true")))
    monkeypatch.setattr("sys.argv", ["castalia", "config", "check", str(path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "model.qk_norm=true is one norm over all heads" in capsys.readouterr().err


def test_heads_widths_and_vocabularies_that_do_not_divide_are_all_named(tiny):
    config = tiny("llama", "model.vocab_size=257", "model.vocab_multiple=1")
    config = config.model_copy(update={"parallel": ParallelConfig(tp=4)})
    with pytest.raises(ConfigError) as refused:
        check_run(config, 4)
    first, second = str(refused.value).splitlines()
    assert first == "parallel.tp=4 does not divide model.num_kv_heads=2; use one of 1, 2"
    assert second == "parallel.tp=4 does not divide the vocabulary's 257 rows; model.vocab_multiple=4 fits"
