"""What `choose_kernel` says is what torch does, and all ways give the same attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from castalia.config.attention_kernels import KernelChoice, Sight, choose_kernel
from castalia.config.schema import ModelConfig
from castalia.generate.kv_cache import KVCache
from castalia.model import attention, transformer
from castalia.model.attention import DTYPE_NAMES, attend, capability, prefers_cudnn, without_cudnn
from castalia.model.init import initialize
from castalia.model.positions import Alibi, aligned_rows, score_bias, visible
from castalia.model.transformer import Transformer

BACKENDS = {"plain": 0, "flash": 1, "memory-efficient": 2, "cuDNN": 3}  # torch.nn.attention.SDPBackend
TINY = ModelConfig(
    num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, vocab_size=90, max_positions=64, init_std=0.3
)
TOKENS = torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(0))


def model_of(**update) -> Transformer:
    model = Transformer(TINY.model_copy(update=update))
    initialize(model, model.cfg, seed=1)
    return model.eval()


def inputs(n: int, kv: int, t: int, k: int, d: int = 16, dtype=torch.float32, device="cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, n, t, d), (2, kv, k, d), (2, kv, k, d)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)


def bias_for(heads: int, t: int, k: int, dtype=torch.float32, device="cpu") -> Tensor:
    """ALiBi's for the last t of k tokens, or a causal one without it where `heads` is 1."""
    keys = torch.arange(k, device=device)[None]
    queries, alibi = keys[:, k - t :], Alibi(heads) if heads > 1 else None
    return score_bias(queries, keys, visible(queries, keys, None), alibi, dtype)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """By the definition, in fp32."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return (q.float() @ k.mT / q.shape[-1] ** 0.5 + bias.float()).softmax(dim=-1) @ v


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("t", [1, 6])
def test_repeated_or_folded_groups_attend_as_the_groups_do(heads, t):
    q, k, v = inputs(4, 2, t, 9)
    bias = bias_for(heads, t, 9)
    expected = plain(q, k, v, bias)
    for repeats in (False, True):
        close(attend(q, k, v, choice=KernelChoice("plain", "bias", repeats=repeats), bias=bias), expected)


class Operations(TorchDispatchMode):
    """Names of the kernels of attention that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in (name := func.__name__):
            self.names.append(name.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "capability, dtype, sight, kernel",
    [
        ((8, 0), "bf16", "last causal", "_scaled_dot_product_flash_attention"),
        ((9, 0), "bf16", "last causal", "_scaled_dot_product_flash_attention"),
        ((9, 0), "bf16", "bias", "_scaled_dot_product_efficient_attention"),
        ((8, 0), "fp32", "bias", "_scaled_dot_product_efficient_attention"),
    ],
    ids=str,
)
def test_kernels_that_are_called_by_name_take_what_they_are_given(capability, dtype, sight, kernel):
    """On tensors without values, the backward pass included; compiled they are one graph."""
    types = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    choice = choose_kernel(capability, dtype, sight, head_size=16, grouped=True, training=True)
    sizes = (4, 6), (2, 9), (2, 9)
    q, k, v = (torch.empty(2, n, t, 16, device="meta", dtype=types[dtype], requires_grad=True) for n, t in sizes)
    bias = aligned_rows(q, (1, 1, 6, 9), q.dtype) if sight == "bias" else None
    with Operations() as seen:
        out = attend(q, k, v, choice=choice, bias=bias)
        gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == (2, 4, 6, 16) and [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    assert seen.names[0] == kernel and choice.sight == sight
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v, choice=choice, bias=bias)
    assert compiled.shape == out.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [9, 16])
def test_a_bias_is_rounded_once_and_hides_with_infinity(dtype, k):
    distance = (torch.arange(k)[None, :] - torch.arange(k)[:, None]).float()
    slopes = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625])[:, None, None]
    expected = (slopes * distance).masked_fill(distance > 0, -torch.inf).to(dtype)
    assert torch.equal(bias_for(4, k, k, dtype), expected[None])
    assert torch.equal(
        bias_for(1, k, k, dtype)[0, 0], torch.zeros(k, k, dtype=dtype).masked_fill(distance > 0, -torch.inf)
    )


@pytest.mark.parametrize(
    "update, documents",
    [({"position": "alibi"}, False), ({"sliding_window": 4}, False), ({}, True), ({"position": "alibi"}, True)],
    ids=str,
)
def test_all_blocks_share_one_bias(update, documents, monkeypatch):
    model, built, seen = model_of(**update), [], []
    build = transformer.score_bias
    monkeypatch.setattr(transformer, "score_bias", lambda *args: built.append(build(*args)) or built[-1])
    for block in model.blocks.values():
        block.register_forward_pre_hook(lambda _, args: seen.append(args[1].bias))
    numbers = (torch.arange(20)[None] > 7).long().expand(2, -1) if documents else None
    model(TOKENS, documents=numbers)
    assert len(built) == 1 and len(seen) == 3 and all(bias is built[0] for bias in seen)
    heads, rows = 4 if model.alibi else 1, 2 if documents else 1
    assert built[0].shape == (rows, heads, 20, 20) and built[0].dtype == torch.float32


def test_slopes_are_copied_to_a_device_once():
    alibi = Alibi(4)
    assert alibi.on(torch.device("cpu")) is alibi.on(torch.device("cpu"))


@pytest.mark.parametrize("device, sight, kernel", [((8, 0), "last causal", "flash"), (None, "bias", "flash")], ids=str)
def test_a_part_of_the_sequence_needs_a_bias_on_cpus_alone(device, sight, kernel, monkeypatch):
    """As the last context rank's, or a chunk of a prompt."""
    model = model_of(sliding_window=None)
    model.compute_dtype = torch.bfloat16
    cache = KVCache(2, 20, torch.device("cpu"))
    model.hidden(TOKENS[:, :12], cache=cache)
    monkeypatch.setattr(transformer, "capability", lambda _: device)  # a stand-in: only the choice is looked at
    context = model.context(torch.zeros(2, 8, 64).bfloat16(), None, cache.reserve(8), None, cache)
    assert (context.choice.sight, context.choice.kernel, context.bias is None) == (sight, kernel, device is not None)


CASES: list[tuple[Sight, int, int]] = [("causal", 64, 64), ("everything", 1, 64), ("bias", 64, 64), ("bias", 40, 64)]


def torch_kernel(q: Tensor, k: Tensor, v: Tensor, sight: Sight, bias: Tensor | None, dropout: float) -> int:
    """The kernel that `scaled_dot_product_attention` takes."""
    grouped = q.shape[1] > k.shape[1]
    return torch._fused_sdp_choice(q, k, v, bias, dropout, sight == "causal", enable_gqa=grouped)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kv", [2, 4])
@pytest.mark.parametrize("sight, t, k", CASES)
def test_torch_chooses_as_told_on_cpus(sight, t, k, kv, dropout):
    q, keys, v = inputs(4, kv, t, k)
    choice = choose_kernel(None, "fp32", sight, head_size=16, grouped=kv < 4, dropout=dropout, training=True)
    bias = bias_for(1, t, k) if sight == "bias" else None
    assert torch_kernel(q, keys, v, sight, bias, dropout) == BACKENDS[choice.kernel]


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [60, 64, 128, 224, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.125])
@pytest.mark.parametrize("writing", [False, True])
@pytest.mark.parametrize("sight, t, k", [("causal", 64, 64), ("everything", 1, 64)])
def test_torch_chooses_as_told_on_this_gpu(sight, t, k, writing, dropout, dtype, head_size):
    for kv in (2, 4):
        q, keys, v = inputs(4, kv, t, k, head_size, dtype, "cuda")
        case = {"head_size": head_size, "grouped": kv < 4, "dropout": dropout, "training": True, "writing": writing}
        choice = choose_kernel(capability(q.device), DTYPE_NAMES[dtype], sight, **case, cudnn=prefers_cudnn(q.device))
        if choice.repeats:
            keys, v = (x.repeat_interleave(4 // kv, dim=1) for x in (keys, v))
        if writing:
            with without_cudnn():
                chosen = torch_kernel(q, keys, v, sight, None, dropout)
        else:
            chosen = torch_kernel(q, keys, v, sight, None, dropout)
        alike = {BACKENDS["flash"], BACKENDS["cuDNN"]}  # in what memory they need
        if (head_size > 128 or dropout) and {chosen, BACKENDS[choice.kernel]} == alike:
            continue  # versions of torch and cuDNN differ in which heads and rates of dropout cuDNN takes
        assert chosen == BACKENDS[choice.kernel], (kv, choice)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kv", [2, 4])
@pytest.mark.parametrize("t, k", [(192, 192), (64, 192), (1, 192), (1, 193), (45, 77)])
@pytest.mark.parametrize("kind", ["plain", "window", "alibi"])
def test_each_way_gives_the_same_attention_on_this_gpu(kind, t, k, kv, dtype):
    """Values and gradients, beside the definition in fp32. 192 keys: where cuDNN's backward pass fails with a bias."""
    bias = bias_for(4 if kind == "alibi" else 1, t, k, dtype, "cuda")
    if kind == "window":
        bias = bias + bias.new_full((t, k), -torch.inf).tril(k - t - 30)
    q, keys, v = inputs(4, kv, t, k, 64, dtype, "cuda")
    sight: Sight = "bias" if kind != "plain" else "everything" if t == 1 else "causal" if t == k else "last causal"
    name, size = DTYPE_NAMES[dtype], {"head_size": 64, "grouped": kv < 4, "training": True}
    choice = choose_kernel(capability(q.device), name, sight, **size, cudnn=prefers_cudnn(q.device))
    assert choice.kernel != "plain" and choice.sight in (sight, "bias")
    given = aligned_rows(bias, bias.shape, dtype).copy_(bias) if choice.sight == "bias" else None
    out = attend(q, keys, v, choice=choice, bias=given)
    expected = plain(q, keys, v, bias)
    close_to = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(out.float(), expected, **close_to)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to("cuda", dtype)
    found = torch.autograd.grad(out, (q, keys, v), d_out)
    for mine, theirs in zip(found, torch.autograd.grad(expected, (q, keys, v), d_out.float()), strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), **close_to)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("update", [{"sliding_window": 64}, {"position": "alibi"}], ids=str)
def test_no_scores_are_made_for_groups_with_a_bias_on_this_gpu(update, dtype):
    """One layer's scores would take 8 heads x 2048 x 2048 x 4 = 128 MiB."""
    cfg = TINY.model_copy(update={"num_heads": 8, "hidden_size": 512, "num_layers": 1, **update})
    model = Transformer(cfg, compute_dtype=dtype)
    initialize(model, cfg, seed=1)
    model.cuda()
    tokens = torch.zeros(1, 2048, dtype=torch.int64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(tokens, labels=tokens)[0].backward()
    bias = (8 if cfg.position == "alibi" else 1) * 2048 * 2048 * dtype.itemsize
    assert torch.cuda.max_memory_allocated() - before - bias < 100 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("update", [{}, {"sliding_window": 5}, {"position": "alibi"}], ids=str)
@torch.inference_mode()
def test_writing_on_this_gpu_gives_what_reading_does(update):
    """Two prompts of 13 and 7 tokens, whose parts of a bias begin at odd places, then single tokens."""
    from castalia.generate.kv_cache import Prompts

    model = model_of(**update).cuda()
    model.compute_dtype = torch.bfloat16
    tokens, cache = TOKENS.cuda(), KVCache(2, 32, torch.device("cuda"))
    prompts = torch.cat([tokens[0, :13], tokens[1, :7]])[None]
    model.hidden(prompts, cache=Prompts(cache, [[0], [1]], [13, 7]))
    cache.set_lengths([13, 7])
    for step in range(4):
        following = torch.stack([tokens[0, 13 + step], tokens[1, 7 + step]])[:, None]
        mine = model(following, cache=cache)[:, 0]
        alone = torch.stack([model(tokens[i : i + 1, : n + step + 1])[0, -1] for i, n in enumerate((13, 7))])
        assert (mine - alone).abs().max() < 0.1 * alone.std()


@pytest.mark.gpu
def test_writing_leaves_cudnn_as_it_was_on_this_gpu(monkeypatch):
    model, seen = model_of().cuda(), []
    attending = F.scaled_dot_product_attention

    def spy(*args, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attending(*args, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    model.hidden(TOKENS.cuda(), cache=KVCache(2, 20, torch.device("cuda")))
    assert seen == [False] * 3 and torch.backends.cuda.cudnn_sdp_enabled() == before
