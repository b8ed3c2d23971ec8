"""One process on a device that works while the host goes on: the meta device, which can be asked for no value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from castalia.config.batch import BatchPlan
from castalia.config.schema import ModelConfig, PreferenceConfig, RunConfig, TrainConfig
from castalia.data.loader import Batch
from castalia.model.transformer import Transformer
from castalia.parallel.executor import Executor, Rows, one_process
from castalia.train.preference import PreferenceLoss

MODEL = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=40, vocab_multiple=1, max_positions=12)
META = torch.device("meta")


class Transfers(TorchDispatchMode):
    """While open, counts the copies from the host to another device."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device == META:
            self.number += any(isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dim() for x in args)
        return out


def executor() -> Executor:
    with META:
        return Executor(Transformer(MODEL))


def batch() -> Batch:
    draw = np.random.default_rng(0)
    tokens, labels = draw.integers(0, 40, (2, 8, 12))
    return Batch(tokens, labels, labels != -100, rewards=draw.integers(0, 2, 8))


def test_gradients_of_later_micro_batches_are_not_made_whole():
    """That of the embedding has a row for each token of the vocabulary."""
    learner = one_process(RunConfig(model=MODEL), torch.float32, torch.device("cpu"), BatchPlan(8, 2, 4))
    learner.initialize(RunConfig(model=MODEL))
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(function)
            return function(*args, **(kwargs or {}))

    with Made():
        learner.forward_backward(Rows.of(batch()), [0.25] * 4, 1.0, range(4))
    assert made.count(torch.ops.aten.embedding_dense_backward.default) == 1
    assert made.count(torch.ops.aten.index_add_.default) == 3


def test_a_steps_batch_goes_to_the_device_once():
    learner, rows = executor(), Rows.of(batch())
    learner.loss_sum(rows)  # makes the table of rotations
    with Transfers() as seen:
        learner.forward_backward(rows, [0.25] * 4, 1.0, range(4))
    assert seen.number == 2  # tokens and labels


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward"])
def test_preferences_wait_for_no_value_of_the_device(objective):
    config = RunConfig(
        model=MODEL, train=TrainConfig(objective=objective), preference=PreferenceConfig(reference_free=True)
    )
    learner = executor()
    if objective == "reward":
        with META:
            learner = Executor(Transformer(MODEL.model_copy(update={"reward_head": True})))
    loss = PreferenceLoss(config, learner, executor(), accumulation=2)
    assert loss.forward_backward(batch(), 1.0, [1, 2]).device == META
    with pytest.raises(NotImplementedError):  # the report, which comes last
        loss.make_report()


@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize("parallel_residual", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_tokens_that_are_left_out_change_nothing(reward, parallel_residual, exact):
    torch.manual_seed(0)
    changed = {"reward_head": reward, "parallel_residual": parallel_residual, "mlp_bias": not exact}
    model, data = Transformer(MODEL.model_copy(update=changed), exact=exact), batch()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for row, (begin, end) in enumerate(((1, 3), (4, 5), (0, 12), (1, 2), (1, 1), (2, 4), (0, 6), (5, 9))):
        data.labels[row, :begin] = data.labels[row, end:] = -100
    rows, objective = Rows.of(data), (lambda values, micro: values.square().sum()) if reward else None
    assert [part.width for part in rows.split(2)] == [5, 12, 4, 9]
    kept = [each.kept for each in Executor(model, 2).computed(list(rows.split(2)))]
    assert [each and each.shape for each in kept] == [(2, 5), (2, 12), (2, 4), (2, 9)]
    assert [each and len(each.tokens) for each in kept] == [8, 14, 5, 15]  # 3 + 5, 12 + 2, 1 + 4, 6 + 9
    assert [each and len(each.labelled) for each in kept] == [3, 13, 3, 10]  # one of them stands for no label
    found = []
    for cuts in (True, False):
        learner = Executor(model, 2, cuts_padding=cuts)
        model.zero_grad()
        total = learner.forward_backward(rows, [0.1, 0.2, 0.3, 0.4], 1.0, range(4), objective)
        with learner.evaluating():
            judged = learner.each_sequence(rows)
            sums = learner.loss_sum(rows) if not reward else torch.zeros(())
        found.append([total, judged, sums, *learner.gradients()])
    for cut, whole in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


def test_of_sequences_without_labels_one_token_is_computed():
    rows = Rows.of(batch())
    rows.labels.fill_(-100)
    assert rows.width == 1


def test_evaluation_gives_the_mode_back_also_after_an_error():
    ranks = executor()
    assert ranks.model.training
    with pytest.raises(ValueError, match="no batch"), ranks.evaluating():
        assert not ranks.model.training and not torch.is_grad_enabled()
        raise ValueError("no batch")
    assert ranks.model.training and torch.is_grad_enabled()
