import pytest
import torch
from torch.nn import functional as F

from castalia.model import loss
from castalia.model.loss import linear_cross_entropy, linear_cross_entropy_reference, token_losses


def example(dtype: torch.dtype, masked: int = 0):
    """Hidden states, a head in fp32 and labels of which some do not count, among them the first `masked` of a row."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 50, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(70, 24, generator=generator).requires_grad_()
    labels = torch.randint(70, (3, 50), generator=generator)
    labels[1, 10:30] = labels[:, :masked] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("rows", [7, 64, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("z_loss", "masked"), [(0.0, 0), (0.1, 0), (0.1, 35)])
def test_chunked_equals_reference(monkeypatch, rows, dtype, tolerance, z_loss, masked):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", rows * 4 * 70)
    monkeypatch.setitem(loss.BLOCK_BYTES, "cpu", 20 * 4 * 70)
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden, weight, labels = example(dtype, masked)
        total, count = function(hidden, weight, labels, z_loss)
        (total / count).backward()
        results.append((total, count, hidden.grad, weight.grad))
    (total, count, d_hidden, d_weight), (expected, expected_count, expected_hidden, expected_weight) = results
    assert total.dtype == d_weight.dtype == torch.float32
    assert count == expected_count == (45 if masked else 130)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for ours, theirs in ((d_hidden, expected_hidden), (d_weight, expected_weight)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_capped_logits_have_the_gradients_of_the_reference(monkeypatch, z_loss):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 7 * 4 * 70)
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden, weight, labels = example(torch.float32)
        total, _ = function(hidden, weight, labels, z_loss, 3.0)
        total.backward()
        results.append((total, hidden.grad, weight.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    uncapped, _ = linear_cross_entropy(hidden, weight, labels, z_loss)
    assert abs(uncapped - total) > 1
    if z_loss == 0:
        hidden, weight, labels = example(torch.float32)
        losses = token_losses(hidden, weight, labels, cap=3.0)
        losses.sum().backward()
        again = (losses.sum(), hidden.grad, weight.grad)
        torch.testing.assert_close(again, results[1], rtol=1e-5, atol=1e-5)


def test_z_loss_draws_the_sum_of_exponentials_to_one():
    hidden, weight, labels = example(torch.float32)
    plain, count = linear_cross_entropy(hidden, weight, labels)
    log_sums = (hidden @ weight.T).logsumexp(-1)[labels != -100]
    total, _ = linear_cross_entropy(hidden, weight, labels, z_loss=0.5)
    torch.testing.assert_close(total - plain, 0.5 * log_sums.square().sum(), rtol=1e-4, atol=0)


def test_a_frozen_head_and_no_gradients():
    hidden, weight, labels = example(torch.float32)
    with torch.no_grad():
        expected, _ = linear_cross_entropy(hidden, weight, labels)
    total, _ = linear_cross_entropy(hidden, weight.detach(), labels)
    total.backward()
    assert total == expected and weight.grad is None
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_a_head_in_16_bits_gets_a_gradient_in_16_bits():
    hidden, weight, labels = example(torch.bfloat16)
    narrow = weight.detach().bfloat16().requires_grad_()
    linear_cross_entropy(hidden, weight, labels)[0].backward()
    linear_cross_entropy(hidden, narrow, labels)[0].backward()
    assert torch.equal(narrow.grad, weight.grad.bfloat16())


def test_nothing_to_learn_gives_zero_and_no_gradient():
    hidden, weight, labels = example(torch.float32)
    total, count = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    total.backward()
    assert total == 0 and count == 0
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_no_fp32_logits_of_all_tokens(monkeypatch):
    """The largest fp32 tensor that the forward pass makes is one block, also within a larger chunk."""
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 20 * 2 * 70)
    monkeypatch.setitem(loss.BLOCK_BYTES, "cpu", 10 * 4 * 70)
    hidden, weight, labels = example(torch.bfloat16)
    sizes = []
    exponentials = loss._exponentials
    monkeypatch.setattr(loss, "_exponentials", lambda x: sizes.append(x.numel()) or exponentials(x))
    linear_cross_entropy(hidden, weight, labels)
    chunks = -(-int((labels != loss.IGNORE).sum()) // 20)  # of the tokens that have a label
    assert 2 * chunks - 1 <= len(sizes) <= 2 * chunks and max(sizes) == 10 * 70


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "masked"), [(torch.float32, 1e-5, 0), (torch.float32, 1e-5, 35), (torch.bfloat16, 2e-2, 0)]
)
def test_losses_of_tokens_and_a_gradient_for_each(monkeypatch, rows, dtype, tolerance, masked):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", rows * 4 * 70)
    hidden, weight, labels = example(dtype, masked)
    wishes = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    losses = token_losses(hidden, weight, labels)
    found = torch.autograd.grad(losses, (hidden, weight), wishes)
    logits = (hidden @ weight.to(dtype).T).float()
    plain = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert losses.shape == labels.shape and losses.dtype == torch.float32 and not losses[labels == -100].any()
    torch.testing.assert_close(losses, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses.sum(), linear_cross_entropy(hidden, weight, labels)[0], rtol=1e-6, atol=0)
    for ours, theirs in zip(found, torch.autograd.grad(plain, (hidden, weight), wishes), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def test_losses_of_tokens_with_a_frozen_head():
    hidden, weight, labels = example(torch.float32)
    expected, _ = torch.autograd.grad(token_losses(hidden, weight, labels).sum(), (hidden, weight))
    (found,) = torch.autograd.grad(token_losses(hidden, weight.detach(), labels).sum(), (hidden,))
    assert torch.equal(found, expected)


def test_fp16_gradients_of_unlikely_tokens_are_kept():
    """The function that GPUs take, beside fp32: half of the tokens have probabilities that fp16 rounds to zero."""
    hidden, weight, labels = example(torch.float32)
    with torch.no_grad():
        weight[35:] = 0.01 * weight[35:]
        weight[:, 0], hidden[..., 0] = 10.0, 1.0
        weight[35:, 0] = -4.0
    found = []
    for dtype in (torch.float32, torch.float16):
        rows = hidden.detach().to(dtype).flatten(0, 1).requires_grad_()
        head = weight.detach().requires_grad_()
        loss._LinearCrossEntropy.apply(rows, head, labels.flatten() % 35, 0.0, True).backward()
        found.append((rows.grad.float(), head.grad))
    (expected, wide), (d_hidden, d_weight) = found
    assert 0 < wide[35:].abs().max() < 150 * 3e-8  # sums over 150 tokens
    torch.testing.assert_close(d_weight[35:], wide[35:], rtol=0, atol=0.05 * wide[35:].abs().max().item())
    torch.testing.assert_close(d_weight[:35], wide[:35], rtol=0, atol=0.01 * wide.abs().max().item())
    torch.testing.assert_close(d_hidden, expected, rtol=0, atol=0.01 * expected.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("function", [linear_cross_entropy, lambda *args: (token_losses(*args).sum(), None)])
def test_fp16_gradients_on_a_gpu_are_those_of_fp32(function):
    """Features that are large and alike for many tokens, whose sum is beyond fp16's range."""
    generator, found = torch.Generator().manual_seed(0), []
    start = torch.randn(4096, 64, generator=generator)
    start[:, 0] = 40.0
    head, labels = torch.randn(1000, 64, generator=generator) * 0.02, torch.full((4096,), 7)
    for dtype in (torch.float32, torch.float16):
        rows, weight = start.cuda().to(dtype).requires_grad_(), head.cuda().requires_grad_()
        function(rows, weight, labels.cuda())[0].backward()
        found.append((rows.grad.float(), weight.grad))
    assert found[0][1].abs().max() > 65504
    for wide, narrow in zip(*found, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=0, atol=0.01 * wide.abs().max().item())
