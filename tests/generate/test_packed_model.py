import pytest
import torch

from castalia.generate import packed_matmul
from castalia.generate import packed_model as packing
from castalia.generate.generation import generate
from castalia.generate.kv_cache import KVCache, Prompts
from castalia.generate.packed_matmul import Fp32Product, Int8PartsProduct, Int8Product
from castalia.generate.packed_model import has_bf16_kernels, pack

TOKENS = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "llama": {"norm": "rmsnorm", "gated_mlp": True, "activation": "silu"},
    "gpt2": {"tie_embeddings": True, "position": "learned", "num_kv_heads": 4},
    "neox": {"parallel_residual": True, "rotary_pct": 0.5},
    "shared norm, one kv head": {"parallel_residual": True, "shared_norm": True, "num_kv_heads": 1},
    "gated, side by side": {"parallel_residual": True, "norm": "rmsnorm", "gated_mlp": True, "mlp_bias": False},
    "alibi": {"parallel_residual": True, "position": "alibi", "norm": "scalenorm"},
    "norms of heads": {
        "norm": "rmsnorm",
        "qk_norm": "head",
        "head_dim": 12,
        "norm_placement": "both",
        "zero_centered_norms": True,
        "sliding_window": 5,
        "window_pattern": (True, False),
        "rotary_pattern": (False, True),
    },
    "zero-centered, side by side": {"parallel_residual": True, "norm": "rmsnorm", "zero_centered_norms": True},
    "no parameters in norms": {
        "parallel_residual": True,
        "norm": "layernorm_no_params",
        "num_kv_heads": 4,
        "qk_norm": True,
    },
}
TEXT = "She sells sea shells by the sea shore. The shells she sells are surely seashells. "


@torch.inference_mode()
def apart(model, packed) -> float:
    """The deviation of the logits in units of their own."""
    found, expected = packed(TOKENS), model(TOKENS)
    assert found.dtype == torch.float32
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.fixture
def make_twins(make_model):
    """Two equal models, with scales, shifts and biases that tell them from ones without."""

    def make(family: str):
        twins = make_model(**FAMILIES[family]), make_model(**FAMILIES[family])
        for model in twins:
            generator = torch.Generator().manual_seed(2)
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    noise = torch.randn(parameter.shape, generator=generator) * 0.2
                    parameter.data = noise + ("norm" in name and name.endswith("weight"))
        return twins

    return make


@pytest.mark.parametrize(("rows", "shares"), [(1, False), (1, True), (16, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_gives_the_same_logits(make_twins, family, rows, shares, monkeypatch):
    monkeypatch.setattr(packed_matmul, "takes_shares", lambda: shares)
    model, packed = make_twins(family)
    pack(packed, rows=rows)
    assert apart(model, packed) < 1e-6


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_writes_the_same_tokens(make_twins, tokenizer, family, rows):
    model, packed = make_twins(family)
    pack(packed, rows=rows)
    prompts = ["a", "some bytes", "three"][:rows]
    assert generate(packed, tokenizer, prompts, max_tokens=20) == generate(model, tokenizer, prompts, max_tokens=20)


needs_bf16_kernels = pytest.mark.skipif(
    not has_bf16_kernels(), reason="this CPU has no bf16 kernels (AVX-512): a bf16 model is not packed here"
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("int8", "bound"),
    [pytest.param(False, 0.05, id="bf16", marks=needs_bf16_kernels), pytest.param(True, 0.1, id="int8")],
)
def test_fewer_bits_change_logits_little(make_twins, family, int8, bound, monkeypatch):
    monkeypatch.setattr(packing, "SMALL", 0)
    model, packed = make_twins(family)
    pack(packed.bfloat16(), int8=int8)
    assert 0 < apart(model, packed) < bound


@needs_bf16_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_bf16_change_little(make_twins, family, monkeypatch):
    """Where that is faster: two prompts of different lengths, whose keys and values are kept in fp32."""
    found = []
    for model, halves in zip(make_twins(family), (False, True), strict=True):
        monkeypatch.setattr(packing, "prompts_are_bf16", lambda halves=halves: halves)
        pack(model.bfloat16(), rows=2)
        cache = KVCache(2, 20, model.device, model.cache_dtype)
        with torch.inference_mode():
            prompts = Prompts(cache, [[0], [1]], [13, 7])
            found.append(model.logits(model.hidden(TOKENS[:1], cache=prompts)[0]))
        assert {part.dtype for layer in cache.layers.values() for part in layer} == {torch.float32}
    assert 0 < (found[0] - found[1]).square().mean().sqrt() / found[0].std() < 0.02


def test_int8_codes_are_the_nearest():
    weight = torch.randn(64, 48) * torch.logspace(-6, 2, 64)[:, None]
    weight[7] = 0
    product = Int8Product(weight, None, rows=1)
    steps = product.scale.float()[:, None]
    # the scale is rounded too, so that the largest value of a row may lie beyond the last code
    assert ((product.codes * steps - weight).abs() <= steps * (0.5 + 127 * 2**-8)).all()
    assert ((product.codes * steps - weight).abs() <= steps * 0.501).float().mean() > 0.98
    assert (product(torch.ones(1, 48))[0, 7] == 0).all()


needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no 8-bit products (VNNI)")


@needs_vnni
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 96)], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [1, 2, 16, 200])
def test_inputs_in_two_parts_are_nearly_exact(rows, bias):
    """Rows of very different size, one of which is 0; with many rows inputs are rounded to bf16."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 640), torch.randn(rows, 640) * torch.logspace(-6, 6, rows)[:, None]
    x[rows // 2] *= rows == 1
    product, reference = Int8PartsProduct(weight, bias, rows=1), Int8Product(weight, bias, rows=1)
    exact = x.double() @ (reference.codes.double() * reference.scale.double()[:, None]).T
    found = product(x).double() - (0 if bias is None else bias.double())
    apart = (found - exact).abs().amax(1) / x.abs().amax(1).clamp(min=1)
    assert apart.max() < (0.01 if rows <= packed_matmul.PART_ROWS else 1.0)
    for number in (0, rows - 1):  # sums are exact, so that a row has the same bits alone and among others
        if rows <= packed_matmul.PART_ROWS:
            assert torch.equal(product(x[number : number + 1])[0], product(x)[number])


@needs_vnni
def test_what_is_not_finite_stays_so():
    product, x = Int8PartsProduct(torch.ones(96, 64), None, rows=1), torch.ones(3, 64)
    x[0, 5], x[1, 5] = torch.inf, torch.nan
    assert product(x).isfinite().all(dim=1).tolist() == [False, False, True]


@pytest.mark.parametrize(("shares", "fewest"), [(False, 2), (True, 4)], ids=["one product", "shares"])
@pytest.mark.parametrize("packed_rows", [1, 2, 16])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5])
def test_any_number_of_rows_and_outputs(rows, packed_rows, shares, fewest, monkeypatch):
    """The outputs have no common divisor with any number of shares."""
    monkeypatch.setattr(packed_matmul, "takes_shares", lambda: shares)
    monkeypatch.setattr(packed_matmul, "fewest_rows", lambda dtype: fewest)
    torch.manual_seed(0)
    weight, x = torch.randn(97, 64), torch.randn(rows, 1, 64)
    for bias in (None, torch.randn(97)):
        expected = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(Fp32Product(weight, bias, packed_rows)(x), expected)


@pytest.mark.parametrize("rows", [1, 3, 65])
def test_few_and_many_rows_multiply_alike(rows, monkeypatch):
    monkeypatch.setattr(packed_matmul, "WIDENED", 64 * 40)  # two parts and a rest
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 64), torch.randn(96), torch.randn(rows, 5, 64)
    product = Int8Product(weight, bias, rows=1)
    expected = x.bfloat16().float() @ (product.codes * product.scale.float()[:, None]).T + bias
    torch.testing.assert_close(product(x), expected, atol=0.2, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_packed_models_write_what_the_plain_one_does(make_model, tokenizer, dtype, monkeypatch):
    """After a hundred steps on one text, which leave little doubt about the next letter."""
    monkeypatch.setattr(packing, "SMALL", 0)
    model = make_model(init_std=0.05, parallel_residual=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([tokenizer.encode(TEXT * 2)])[:, :64]
    for shift in range(100):
        tokens = ids.roll(-shift % 7, dims=1)
        loss, count = model(tokens[:, :-1], tokens[:, 1:])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts = [TEXT[:12], TEXT[5:9], TEXT[20:40]]
    expected = generate(model, tokenizer, prompts, max_tokens=20)
    packed = make_model(init_std=0.05, parallel_residual=True)
    packed.load_state_dict(model.state_dict())
    pack(packed if dtype == torch.float32 else packed.bfloat16(), int8=dtype == torch.int8)
    found = generate(packed, tokenizer, prompts, max_tokens=20)
    same = sum(a == b for text, other in zip(found, expected, strict=True) for a, b in zip(text, other, strict=True))
    assert same == 60 if dtype == torch.float32 else same >= 50
    assert found == [generate(packed, tokenizer, [prompt], max_tokens=20)[0] for prompt in prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_of_a_prompt_is_that_of_torch(dtype, monkeypatch):
    """In pieces that do not divide it, and from a strided tensor."""
    monkeypatch.setattr(packing, "PIECE", 64)
    x = torch.linspace(-9, 9, 2 * 31 * 24).view(2, 31, 24).to(dtype)[..., 8:]
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(
        packing._gelu_tanh(x).double(), expected, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2**-8
    )
