import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from castalia.config.batch import BatchPlan
from castalia.config.schema import LossScaleConfig, ModelConfig, OptimizerConfig
from castalia.data.loader import Batch
from castalia.errors import TrainingError
from castalia.model.init import initialize
from castalia.model.transformer import Transformer
from castalia.parallel.activation_checkpointing import apply_activation_checkpointing
from castalia.parallel.executor import Executor
from castalia.train.loss_scale import LossScaler
from castalia.train.optimizer import make_optimizer
from castalia.train.schedule import LearningRate
from castalia.train.step import MAX_SKIPPED_IN_A_ROW, TrainStep, dropout_seed

CONFIG = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=40, vocab_multiple=1, max_positions=12)
RATE = LearningRate(0.01, 0.0, 0.0, 100, "constant")


def build(micro_batch_size=8, model=CONFIG, dtype=torch.float32, rate=RATE, **options):
    """A step of 8 sequences over a fresh model."""
    module = Transformer(model, compute_dtype=dtype)
    initialize(module, model, 1)
    plan = BatchPlan(8, micro_batch_size, 8 // micro_batch_size)
    optimizer = make_optimizer(dict(module.named_parameters()), OptimizerConfig(lr=0.01))
    options = {"clip_norm": None, "seed": 1, **options}
    return TrainStep(Executor(module), optimizer, rate, plan, **options)


def batch(step=0):
    """Labels masked unevenly: row r loses its first r places, and row 7 nearly all."""
    draw = np.random.default_rng(step)
    tokens = draw.integers(0, 40, (8, 12))
    labels = draw.integers(0, 40, (8, 12))
    for row in range(8):
        labels[row, : row if row < 7 else 11] = -100
    return Batch(tokens, labels, labels != -100)


def token_losses(module, data):
    """[8, 12], zero where masked."""
    logits = module(torch.from_numpy(data.tokens)).float()
    labels = torch.from_numpy(data.labels)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def weights(step):
    return torch.cat([parameter.detach().flatten() for parameter in step.executor.model.parameters()])


def test_loss_is_the_mean_over_all_tokens_whatever_the_micro_batch():
    reference = build()
    data = batch()
    losses = token_losses(reference.executor.model, data)
    expected = (losses.sum() / data.loss_mask.sum()).item()
    results, after = [], []
    for micro_batch_size in (8, 4, 2, 1):
        step = build(micro_batch_size)
        results.append(step(0, data))
        after.append(weights(step))
    assert all(result.loss == pytest.approx(expected, rel=1e-6) for result in results)
    assert all(result.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-5) for result in results)
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], atol=2e-5, rtol=0)


def test_the_originals_mean_of_micro_batch_means_is_another_number():
    step, data = build(2, micro_batch_means=True), batch()
    losses = token_losses(step.executor.model, data)
    rows = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    expected = np.mean([(losses[r].sum() / data.loss_mask[r].sum()).item() for r in rows])
    assert step(0, data).loss == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx((losses.sum() / data.loss_mask.sum()).item(), rel=1e-3)


def test_clipping_scales_the_gradient_to_the_limit():
    free, data = build(), batch()
    norm = free(0, data).grad_norm
    applied = []
    for limit in (norm / 2, norm * 2):
        step = build(clip_norm=limit)
        step.optimizer = Recorder(step.optimizer)
        assert step(0, data).grad_norm == pytest.approx(norm)  # reported as it was
        applied.append(step.optimizer.norm)
    assert applied == pytest.approx([norm / 2, norm], rel=1e-4)


class Recorder:
    """Stands before an optimizer and notes the norm of the gradients that reach it."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.zero_grad = optimizer, optimizer.param_groups, optimizer.zero_grad

    def step(self):
        self.norm = math.sqrt(sum(p.grad.square().sum().item() for g in self.param_groups for p in g["params"]))
        self.optimizer.step()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_bit(mode):
    model = CONFIG.model_copy(update={"hidden_dropout": 0.1, "attention_dropout": 0.1})
    plain, recomputed = build(4, model), build(4, model)
    apply_activation_checkpointing(recomputed.executor.model, mode, dropout=True)
    for number in range(2):
        assert plain(number, batch(number)) == recomputed(number, batch(number))
    assert torch.equal(weights(plain), weights(recomputed))


def test_dropout_differs_between_steps_micro_batches_and_ranks():
    seeds = {dropout_seed(1, step, micro, rank) for step in range(5) for micro in range(5) for rank in range(5)}
    assert len(seeds) == 125
    model = CONFIG.model_copy(update={"hidden_dropout": 0.3})
    assert build(model=model)(0, batch()).loss == build(model=model)(0, batch()).loss
    assert build(model=model)(0, batch()).loss != build(model=model)(1, batch()).loss


def test_an_overflow_leaves_weights_and_schedule_and_halves_the_scale():
    rate = LearningRate(0.01, 0.0, 4.0, 100, "linear")
    scaler = LossScaler(LossScaleConfig(initial=2.0**40), "stage0")
    step = build(dtype=torch.float16, scaler=scaler, rate=rate)
    before = weights(step)
    result = step(0, batch())
    assert not result.applied
    assert result.lr == rate(0)
    assert scaler.scale == 2.0**39
    assert torch.equal(weights(step), before)
    assert all(state["step"] == 0 for state in step.optimizer.state.values())
    scaler.scale = 2.0**8
    results = [step(number, batch(number)) for number in (1, 2, 3)]
    assert [r.applied for r in results] == [True] * 3
    assert [r.lr for r in results] == [rate(0), rate(1), rate(2)]  # the skipped step does not count
    assert step.skipped == 1


def test_gradients_and_update_apart_are_the_whole_step():
    whole, halves = build(clip_norm=0.1), build(clip_norm=0.1)
    result = whole(0, batch())
    assert halves.gradients(0, batch()) == (result.loss, result.grad_norm)
    assert halves.apply() == result and result.applied
    assert torch.equal(weights(halves), weights(whole))


def test_a_skipped_step_leaves_weights_and_schedule():
    rate = LearningRate(0.01, 0.0, 4.0, 100, "linear")
    step = build(rate=rate)
    before = weights(step)
    step.gradients(0, batch())
    result = step.skip()
    assert not result.applied and torch.equal(weights(step), before)
    assert all(parameter.grad is None for parameter in step.executor.parameters.values())
    assert step(1, batch(1)).lr == rate(0)


def test_the_loss_scale_cancels_out():
    losses = [build(scaler=LossScaler(LossScaleConfig(static=s), "zero"), clip_norm=0.1) for s in (1.0, 1024.0)]
    first, second = (step(0, batch()) for step in losses)
    assert first == pytest.approx(second, rel=1e-6)
    torch.testing.assert_close(weights(losses[0]), weights(losses[1]), atol=1e-6, rtol=0)


def test_fifty_skipped_steps_in_a_row_end_the_run():
    step = build(dtype=torch.float16, scaler=LossScaler(LossScaleConfig(static=2.0**100), "stage0"))
    for number in range(MAX_SKIPPED_IN_A_ROW - 1):
        step(number, batch())
    with pytest.raises(TrainingError, match="50 steps in a row, up to step 50, overflowed"):
        step(MAX_SKIPPED_IN_A_ROW - 1, batch())


def fill(name, value):
    def spoil(model):
        nn.init.constant_(model.get_parameter(name), value)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (fill("blocks.1.mlp.up.weight", math.nan), "the parameter blocks.1.mlp.up.weight"),
        (fill("blocks.1.norm2.weight", 3e38), "the loss, after the output of blocks.1"),
    ],
)
def test_the_first_bad_tensor_is_named_and_weights_stay(spoil, culprit):
    step = build(4)
    spoil(step.executor.model)
    before = weights(step)
    with pytest.raises(TrainingError, match=f"step 4 is not finite .* is {culprit}"):
        step(3, batch())
    assert torch.equal(weights(step).nan_to_num(), before.nan_to_num())


def test_a_bad_gradient_is_named():
    step = build()
    step.executor.model.get_parameter("blocks.0.attn.qkv.bias").register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match="the gradient of blocks.0.attn.qkv.bias"):
        step(0, batch())


def test_a_batch_without_labels_is_refused():
    nothing = Batch(np.zeros((8, 12), np.int64), np.full((8, 12), -100), np.zeros((8, 12), bool))
    with pytest.raises(TrainingError, match="step 3: every label of the batch is masked"):
        build()(2, nothing)


def test_clipping_by_the_norm_of_a_part():
    """Of the tensors that count, and of their first entries; what is reported is the norm of all."""
    plain, part = (
        build(clip_norm=1e-3),
        build(clip_norm=1e-3, counted_in_norm={"norm.weight": None, "embed.weight": (0, 4)}),
    )
    grads = {}
    for step in (plain, part):
        before = {name: p.detach().clone() for name, p in step.executor.parameters.items()}
        step.optimizer = torch.optim.SGD(step.executor.model.parameters(), lr=1.0)
        step.optimizer.param_groups[0]["lr_scale"] = 100.0  # times the rate of 0.01
        grads[step] = (
            step(0, batch()).grad_norm,
            {n: before[n] - p.detach() for n, p in step.executor.parameters.items()},
        )
    (norm, whole), (reported, counted) = grads[plain], grads[part]
    assert norm == reported
    size = torch.cat([counted["norm.weight"], counted["embed.weight"][:4].flatten()]).norm()
    assert size.item() == pytest.approx(1e-3, rel=1e-3)
    ratio = counted["head.weight"].norm() / whole["head.weight"].norm()
    assert ratio.item() > 1.5
