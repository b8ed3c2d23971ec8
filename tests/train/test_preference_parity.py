"""Our losses, rewards and gradients beside those of trl's trainers, on the same log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from castalia.config.schema import PreferenceConfig
from castalia.train.preference import dpo, kto, orpo, reward_model

pytestmark = pytest.mark.slow  # importing trl takes five seconds
TOKENS = 12


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather(self, value):
        return value

    gather_for_metrics = gather


def trainer(**settings) -> SimpleNamespace:
    """What the trainers' `_compute_loss` reads of themselves."""
    plain = {"aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": True, "use_weighting": False}
    model = SimpleNamespace(training=True)
    counts = {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1}
    return SimpleNamespace(model=model, accelerator=Accelerator(), **plain, **counts, **settings)


def outputs(log_probs: torch.Tensor) -> SimpleNamespace:
    """What a model says of sequences; only the log-probabilities matter for the loss."""
    nothing = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def example(sequences: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of each token [n, 12], 0 where it does not count, of each text by the reference, and a mask."""
    draw = torch.Generator().manual_seed(sequences)
    lengths = torch.randint(2, TOKENS, (sequences, 1), generator=draw)
    mask = torch.arange(TOKENS) >= TOKENS - lengths
    logps = -torch.rand(sequences, TOKENS, generator=draw, dtype=torch.float64) * 3 * mask
    references = logps.sum(1) + torch.randn(sequences, generator=draw, dtype=torch.float64)
    return logps.requires_grad_(), references, mask


def inputs(mask: torch.Tensor, **others) -> dict:
    whole = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], dim=1)  # before the shift
    return {"input_ids": torch.ones_like(whole), "attention_mask": whole, "completion_mask": whole, **others}


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor, leaf: torch.Tensor) -> None:
    """The losses and their gradients."""
    gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("reference_free", [False, True])
def test_dpo(loss: str, reference_free: bool) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")
    logps, references, mask = example(10)
    references = references * (not reference_free)
    theirs = trainer(beta=0.3, loss_types=[loss], loss_weights=[1.0], f_divergence_type="reverse_kl")
    order = torch.cat([torch.arange(0, 10, 2), torch.arange(1, 10, 2)])  # all preferred ones first
    sides = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), references[order].chunk(2), strict=True))
    expected = trl.DPOTrainer._compute_loss(
        theirs, lambda **_: outputs(logps[order]), inputs(mask[order], **sides), False
    )
    judged = dpo(logps.sum(1), references, mask.sum(1), PreferenceConfig(loss=loss, beta=0.3))
    assert_equal(judged.losses.mean(), expected, logps)
    told = theirs._metrics["train"]
    assert judged.rewards[0::2].mean().item() == pytest.approx(told["rewards/chosen"][0], abs=1e-6)
    assert judged.rewards[1::2].mean().item() == pytest.approx(told["rewards/rejected"][0], abs=1e-6)
    assert judged.right.float().mean().item() == pytest.approx(told["rewards/accuracies"][0])


def test_kto() -> None:
    """trl takes mismatched texts for the divergence; here each half of the batch is given the other half for them."""
    trl = pytest.importorskip("trl", reason="needs trl")
    logps, references, mask = example(8)
    references = references + torch.tensor([0.5, -2.0]).repeat_interleave(4)  # one half's divergence is cut off at 0
    wanted = torch.tensor([True, False, True, True, False, True, False, False])
    settings = PreferenceConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    judged = kto(logps.sum(1), references, wanted, settings)
    assert judged.kl is not None and judged.kl.min() == 0 < judged.kl.max()
    halves = torch.arange(8).chunk(2)
    expected = []
    for half, other in (halves, halves[::-1]):
        theirs = trainer(beta=0.3, loss_type="kto", calculate_KL=True, desirable_weight=1.5, undesirable_weight=0.5)
        theirs._compute_kl_logps = lambda model, batch, other=other: logps[other].sum(1).detach()
        batch = inputs(mask[half], label=wanted[half], ref_logps=references[half], ref_KL_logps=references[other])
        found = trl.KTOTrainer._compute_loss(theirs, lambda half=half, **_: outputs(logps[half]), batch, False)
        assert judged.kl[half].mean().item() == pytest.approx(theirs._metrics["train"]["kl"][0], abs=1e-6)
        chosen = judged.rewards[half][wanted[half]].mean().item()
        assert chosen == pytest.approx(theirs._metrics["train"]["rewards/chosen"][0], abs=1e-6)
        expected.append(found)
    assert_equal(judged.losses.mean(), torch.stack(expected).mean(), logps)


def test_orpo() -> None:
    """With a model that has learned nothing, and one that is nearly certain, whose odds are large."""
    trainers = pytest.importorskip("trl.experimental.orpo", reason="needs trl")
    for certainty in (1.0, 1e-3):
        logits, tokens, learned, filled = orpo_texts(certainty)
        theirs = SimpleNamespace(beta=0.3, accelerator=Accelerator())
        logps = torch.log_softmax(logits[:, :-1], -1).gather(2, tokens[:, 1:, None])[..., 0]
        answers, whole = logps * learned[:, 1:], logps * filled[:, 1:]
        means = answers.sum(1) / learned[:, 1:].sum(1)
        losses, *_ = trainers.ORPOTrainer.odds_ratio_loss(theirs, means[0::2], means[1::2])
        targets = tokens[0::2, 1:].masked_fill(~filled[0::2, 1:], -100)
        likelihood = torch.nn.functional.cross_entropy(logits[0::2, :-1].flatten(0, 1), targets.flatten())
        share = 3 / float(filled[0::2, 1:].sum())
        judged = orpo(answers.sum(1), whole.sum(1), learned[:, 1:].sum(1), share, PreferenceConfig(beta=0.3))
        assert_equal(judged.losses.mean(), likelihood - losses.mean(), logits)
        assert judged.right.tolist() == (means[0::2] > means[1::2]).tolist()


def orpo_texts(certainty: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [6, 12, 20] and tokens of three pairs, and masks of their answers and of all their tokens."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 20, (6, TOKENS), generator=draw)
    logits = torch.randn(6, TOKENS, 20, generator=draw) * certainty
    if certainty < 1:
        logits += 9 * torch.nn.functional.one_hot(tokens.roll(-1, 1), 20)
    ends, place = torch.randint(7, TOKENS + 1, (6, 1), generator=draw), torch.arange(TOKENS)
    return logits.requires_grad_(), tokens, (place >= 4) & (place < ends), place < ends


@pytest.mark.parametrize("square", [0.0, 0.1])
def test_reward_model(square: float) -> None:
    """trl's penalty is on the square of both rewards' sum; ours, as the original's, on both squares."""
    trl = pytest.importorskip("trl", reason="needs trl")
    rewards = torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    theirs = trainer(args=SimpleNamespace(center_rewards_coefficient=square or None))
    both = torch.cat([rewards[0::2], rewards[1::2]])
    found = trl.RewardTrainer.compute_loss(
        theirs, lambda **_: SimpleNamespace(logits=both[:, None]), {"attention_mask": torch.ones(10, 4)}
    )
    cross = 2 * square * (rewards[0::2] * rewards[1::2]).mean()
    judged = reward_model(rewards, square)
    assert_equal(judged.losses.mean() + cross, found, rewards)
    assert judged.right.float().mean().item() == pytest.approx(theirs._metrics["train"]["accuracy"][0])
