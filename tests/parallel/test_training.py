"""What happens on a mesh besides plain steps: precision, overflow, recomputation, other layouts."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from castalia.checkpoint.opener import open_checkpoint
from castalia.config.load import load_config, load_run
from castalia.errors import ConfigError, Stopped, TrainingError
from castalia.observe.metrics import read_metrics
from castalia.parallel.executor import StepLeft
from castalia.plan.recompute import choose_blocks
from castalia.train import recomputing
from castalia.train.loop import train
from castalia.train.setup import start
from castalia.train.step_record import peak_speed
from tests.parallel.training import assert_copies_are_equal, digest, pieces, train_steps
from tests.train.evaluation_hook import at_evaluation

pytestmark = pytest.mark.xdist_group("pool")

SLOW = pytest.mark.slow
EVERYTHING = ["parallel.tp=2", "parallel.pp=2", "parallel.zero=3"]


def peak_speed_of(config):
    """A task."""
    return peak_speed(start(config))


def test_mfu_counts_the_devices_of_all_ranks(pool, tiny):
    (alone,) = pool.run(peak_speed_of, 1, tiny())
    assert pool.run(peak_speed_of, 2, tiny()) == [2 * alone] * 2


def train_until_a_signal_in_the_evaluation(config):
    """A task: rank 1 alone gets a signal. Returns how many sequences this rank evaluated."""
    seen = 0

    def stop(tokens):
        nonlocal seen
        if not seen and torch.distributed.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        seen += len(tokens)

    with pytest.raises(Stopped), at_evaluation(stop):
        train(config)
    return seen


def test_a_signal_on_one_rank_cuts_the_evaluation_of_all_short(pool, tiny, corpus, tmp_path):
    valid = f'data.valid=[{{"path": "{corpus / "text"}", "labels": "{corpus / "labels"}"}}]'
    config = tiny("neox-parallel", valid, "eval.every=2", "eval.batches=3", f"checkpoint.dir={tmp_path / 'run'}")
    assert pool.run(train_until_a_signal_in_the_evaluation, 2, config) == [8, 8]  # one batch of 16 of three
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2]
    assert open_checkpoint(tmp_path / "run").progress.step == 2


def leave_a_step(config):
    """A task: a step, and the next one, which is left between two micro-batches. Returns the weights after each."""
    session, seen = start(config), []
    session.step(0, session.batch(0))
    seen.append({piece: digest(value) for piece, value in pieces(session)})
    session.executor.leaves_step = lambda: session.executor.any(session.executor.rank == 1)
    with pytest.raises(StepLeft):
        session.step(1, session.batch(1))
    seen.append({piece: digest(value) for piece, value in pieces(session)})
    return seen


@pytest.mark.parametrize(
    "layout",
    [["parallel.zero=0"], ["parallel.zero=1"], ["parallel.zero=2"], ["parallel.zero=3"], ["parallel.tp=2"]],
    ids=lambda layout: layout[0],
)
def test_a_step_that_is_left_changes_no_weight(pool, tiny, layout):
    config = tiny("neox-parallel", *layout)
    straight = pool.run(train_steps, 2, config, 1)
    for left, whole in zip(pool.run(leave_a_step, 2, config), straight, strict=True):
        assert left == whole.digests * 2


def run_to_the_end(config):
    """A task: the whole run, as `castalia train` does it."""
    train(config)


def losses(folder):
    return [record["loss"] for record in read_metrics(folder)]


@pytest.mark.parametrize("layout", [["parallel.zero=2"], ["parallel.tp=2", "parallel.pp=2"]])
def test_without_accumulation(pool, tiny, layout):
    common = ["train.batch_size=16", "train.accumulation=1"]
    ranks = pool.run(train_steps, 4, tiny("neox-parallel", *common, *layout))
    one = pool.run(train_steps, 1, tiny("neox-parallel", *common))[0]
    np.testing.assert_allclose(ranks[0].losses, one.losses, rtol=2e-6)
    np.testing.assert_allclose(ranks[0].norms, one.norms, rtol=2e-6)


@pytest.mark.parametrize(
    "more",
    [
        ["model.position=alibi"],
        ["model.sliding_window=5"],
        ["model.position=learned", "train.recompute=full"],
        ["train.z_loss=0.001", "train.recompute=selective"],
    ],
    ids=lambda more: more[-1],
)
def test_context_parallel_attends_to_the_same_tokens(pool, tiny, more):
    ranks = pool.run(train_steps, 4, tiny("neox-parallel", "parallel.cp=2", "parallel.tp=2", *more), 4)
    one = pool.run(train_steps, 1, tiny("neox-parallel", *more), 4)[0]
    np.testing.assert_allclose(ranks[0].losses, one.losses, rtol=2e-6)
    np.testing.assert_allclose(ranks[0].norms, one.norms, rtol=2e-6)


@pytest.mark.parametrize("kind, recompute", [("ulysses", "full"), ("ring", "selective")])
def test_query_heads_share_key_heads_on_context_ranks(pool, tiny, kind, recompute):
    layout = ["parallel.cp=4", f"parallel.cp_kind={kind}", f"train.recompute={recompute}"]
    ranks = pool.run(train_steps, 4, tiny("llama", *layout), 4)
    one = pool.run(train_steps, 1, tiny("llama"), 4)[0]
    np.testing.assert_allclose(ranks[0].losses, one.losses, rtol=2e-6)
    np.testing.assert_allclose(ranks[0].norms, one.norms, rtol=2e-6)


def test_documents_do_not_see_each_other_in_tensor_and_pipeline_ranks(pool, tiny):
    ranks = pool.run(train_steps, 4, tiny("llama", "data.mask_documents=true", "parallel.tp=2", "parallel.pp=2"), 4)
    one = pool.run(train_steps, 1, tiny("llama", "data.mask_documents=true"), 4)[0]
    np.testing.assert_allclose(ranks[0].losses, one.losses, rtol=2e-6)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize(
    "layout",
    [["parallel.zero=3"], ["parallel.tp=2", "parallel.sequence_parallel=true"], pytest.param(EVERYTHING, marks=SLOW)],
)
def test_recomputation_changes_no_bit(pool, tiny, layout, recompute):
    world = 8 if layout == EVERYTHING else 2
    plain, again = (
        pool.run(train_steps, world, tiny("gpt2-tied", *layout, f"train.recompute={how}"), 3)
        for how in ("none", recompute)
    )
    assert [(rank.losses, rank.digests) for rank in plain] == [(rank.losses, rank.digests) for rank in again]


def train_with_some_memory(config, usable):
    """A task: what `train_steps` sees where so much memory is usable, the blocks that are computed again, and whether
    the choice is still to be made before the first step."""
    before, recomputing.usable_memory = recomputing.usable_memory, lambda device, communicators: usable
    try:
        seen, choice = train_steps(config, 3), start(config).step.recomputing
        session = start(config)
        session.step(0, session.batch(0))
        again = session.step.recomputing.rank.again
        return seen.losses, seen.digests, again, choice.is_open, [choose_blocks(choice.rank, b) for b in (10**15, 0)]
    finally:
        recomputing.usable_memory = before


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("gpt2-tied", ["parallel.zero=3"]),
        ("mamba", ["parallel.tp=2"]),
        ("experts", ["parallel.expert=2"]),
        ("gpt2-tied", ["parallel.pp=2"]),
        ("gpt2-tied", ["parallel.pp=2", "parallel.pipeline=zero-bubble"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_ranks_that_share_blocks_choose_the_same_ones_and_change_no_bit(pool, tiny, family, layout):
    words = [
        "model.num_layers=4",
        "train.batch_size=32",
        "train.micro_batch_size=8",
        "train.accumulation=null",
        *layout,
    ]
    plain = pool.run(train_steps, 2, tiny(family, *words), 3)
    config = tiny(family, *words, "train.recompute=auto")
    none, full = (rank.memory().total for rank in pool.run(train_with_some_memory, 2, config, 0)[0][-1])
    assert full < none
    found = pool.run(train_with_some_memory, 2, config, (none + full) // 2)
    assert [(rank.losses, rank.digests) for rank in plain] == [rank[:2] for rank in found]
    assert all(was_open for *_, was_open, _ in found)
    again = [rank[2] for rank in found]
    assert 0 < len(again[0]) < 4
    if "parallel.pp=2" in layout:  # each has blocks of its own
        assert not again[0] & again[1]
    else:
        assert again[0] == again[1]


@pytest.mark.parametrize("layout", [["parallel.zero=3", "parallel.tp=2"], ["parallel.pp=2", "parallel.tp=2"]])
def test_bf16_stays_close_to_one_process(pool, tiny, layout):
    ranks = pool.run(train_steps, 4, tiny("neox-parallel", "precision.compute=bf16", *layout))
    one = pool.run(train_steps, 1, tiny("neox-parallel", "precision.compute=bf16"))[0]
    np.testing.assert_allclose(ranks[0].losses, one.losses, rtol=2e-3)


@pytest.mark.parametrize("layout", [["parallel.zero=1"], ["parallel.tp=2"], ["parallel.pp=2"]])
def test_an_overflow_on_one_rank_is_skipped_by_all(pool, tiny, layout):
    common = ["precision.compute=fp16", "precision.loss_scale.initial=1024", "precision.loss_scale.hysteresis=1"]
    common += ["precision.loss_scale.window=3", "precision.loss_scale.rule=zero"]
    ranks = pool.run(train_steps, 2, tiny("neox-parallel", *common, *layout), 10, (1, 4, float("inf")))
    one = pool.run(train_steps, 1, tiny("neox-parallel", *common), 10, (0, 4, float("inf")))[0]
    assert one.applied == [step != 4 for step in range(10)]
    for rank in ranks:
        assert rank.applied == one.applied and rank.scales == one.scales
    good = np.array(one.applied)
    np.testing.assert_allclose(np.array(ranks[0].losses)[good], np.array(one.losses)[good], rtol=2e-3)


@pytest.mark.parametrize("layout", [["parallel.zero=1"], ["parallel.zero=3"], ["parallel.tp=2"], ["parallel.pp=2"]])
def test_nan_on_one_rank_stops_all_and_names_it(pool, tiny, layout):
    with pytest.raises(TrainingError, match=r"step 3 is not finite .* on rank 1\b"):
        pool.run(train_steps, 2, tiny("neox-parallel", *layout), 10, (1, 2, float("nan")))


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.zero=1", "parallel.tp=2", "parallel.sequence_parallel=true"],
        ["parallel.pp=2"],
        pytest.param(EVERYTHING, marks=SLOW),
    ],
)
def test_dropout_trains(pool, tiny, layout):
    dropout = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1", "model.embedding_dropout=0.1"]
    world = 8 if layout == EVERYTHING else 4
    ranks = pool.run(train_steps, world, tiny("gpt2-tied", *dropout, *layout), 5)
    without = pool.run(train_steps, 1, tiny("gpt2-tied"), 5)[0]
    np.testing.assert_allclose(ranks[0].losses, without.losses, rtol=0.05)
    assert ranks[0].losses[0] != pytest.approx(without.losses[0], rel=1e-4)
    assert_copies_are_equal(ranks)


def masks(config) -> dict[str, list[bytes]]:
    """A task: what the first step draws for the embedding, for what blocks add, and for attention's weights."""
    session, drawn = start(config), {"embedding": [], "hidden": [], "attention": []}
    dropout, attend = F.dropout, F.scaled_dot_product_attention

    def drop(x, p, training=True):
        mask = dropout(torch.ones_like(x), p, training)
        drawn["hidden" if drawn["embedding"] else "embedding"].append(mask.numpy().tobytes())
        return x * mask

    def attending(*args, dropout_p, **kwargs):
        drawn["attention"].append(torch.rand(8).numpy().tobytes())
        return attend(*args, **kwargs)

    F.dropout, F.scaled_dot_product_attention = drop, attending
    try:
        session.step(0, session.batch(0))
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attend
    return drawn


@pytest.mark.parametrize(
    "layout, shared",
    [
        (["parallel.cp=2"], []),
        (["parallel.tp=2"], ["embedding", "hidden"]),
        (["parallel.tp=2", "parallel.sequence_parallel=true"], ["embedding"]),
    ],
)
def test_dropout_is_drawn_anew_for_other_tokens_and_heads(pool, tiny, layout, shared):
    dropout = ["model.hidden_dropout=0.5", "model.attention_dropout=0.5", "model.embedding_dropout=0.5"]
    one, two = pool.run(masks, 2, tiny("neox-parallel", "train.accumulation=1", *dropout, *layout))
    assert {kind: len(drawn) for kind, drawn in one.items()} == {"embedding": 1, "hidden": 8, "attention": 4}
    for kind, drawn in one.items():
        assert len(set(drawn)) == len(drawn)
        assert all((mine == other) == (kind in shared) for mine, other in zip(drawn, two[kind], strict=True)), kind


CHANGES = [
    pytest.param(1, [], 4, ["parallel.tp=2", "parallel.pp=2"], id="grow"),
    pytest.param(8, EVERYTHING, 1, [], id="shrink", marks=SLOW),
    pytest.param(4, ["parallel.zero=3"], 2, ["parallel.pp=2", "parallel.pipeline=zero-bubble"], id="v"),
    pytest.param(
        *(2, ["parallel.tp=2", "parallel.sequence_parallel=true"], 4, ["parallel.cp=2", "parallel.zero=1"]),
        id="context",
        marks=SLOW,
    ),
    pytest.param(
        *(4, ["parallel.pp=2", "parallel.tp=2"], 8, ["parallel.zero=2", "parallel.dp_replicate=2", "parallel.tp=2"]),
        id="hsdp",
        marks=SLOW,
    ),
]
NO_LAYOUT = ["parallel.tp=1", "parallel.pp=1", "parallel.cp=1", "parallel.zero=0", "parallel.dp_replicate=null"]
NO_LAYOUT += ["parallel.pipeline=1f1b", "parallel.sequence_parallel=false", "parallel.expert=1"]


@pytest.mark.parametrize("before, first, after, second", CHANGES)
def test_a_run_goes_on_under_another_layout(pool, tiny, tmp_path, before, first, after, second):
    folder, straight = tmp_path / "run", tmp_path / "straight"
    pool.run(run_to_the_end, 1, tiny("gpt2-tied", f"checkpoint.dir={straight}"))
    stop = [f"checkpoint.dir={folder}", "train.exit_interval=5"]
    pool.run(run_to_the_end, before, tiny("gpt2-tied", *stop, *first))
    pool.run(run_to_the_end, after, load_run(folder, ["train.exit_interval=null", *NO_LAYOUT, *second]))
    np.testing.assert_allclose(losses(folder), losses(straight), rtol=2e-6)


BATCH_OF_4 = ["train.batch_size=4", "train.micro_batch_size=null", "parallel.gpus=null"]
ORIGINALS = [
    ("pp1-mp2-z0-fp32-rotary-par", 4, ["parallel.pp=2", *BATCH_OF_4]),
    ("pp1-mp2-z0-fp32-rotary-par", 2, ["parallel.tp=1", "parallel.zero=3", *BATCH_OF_4]),
    ("pp2-mp1-z0-fp32-rotary-seqres", 2, ["parallel.pp=1", "parallel.tp=2"]),
    ("pp2-mp1-z0-fp32-rotary-seqres", 2, []),
]


@pytest.mark.parametrize("variant, world, layout", ORIGINALS)
def test_from_the_originals_checkpoints_its_losses_come_out(pool, fixtures, tmp_path, variant, world, layout):
    folder, data = fixtures / "neox" / variant, fixtures / "neox" / "data"
    paths = [f"{split}_data_paths=[{data / 'enwik8_text_document'}]" for split in ("train", "valid", "test")]
    paths += [f"vocab_file={data / 'tok.json'}", f"save={tmp_path / 'run'}", f"data.cache_dir={tmp_path}"]
    source = folder / "checkpoint" / "global_step5" / "configs" / "config.yml"
    overrides = ["neox_exact=true", f"checkpoint.resume={folder / 'checkpoint'}", *paths, *layout]
    pool.run(run_to_the_end, world, load_config(source, overrides))
    original = json.loads((folder / "losses.json").read_text())["straight_step_1_to_10"]
    assert losses(tmp_path / "run") == pytest.approx(original[5:], abs=2e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_host_memory_for_parameters_needs_an_accelerator(pool, tiny, world):
    with pytest.raises(ConfigError, match="parallel.offload"):
        pool.run(train_steps, world, tiny("neox-parallel", "parallel.zero=3", "parallel.offload=true"))
