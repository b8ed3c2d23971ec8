import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError
from castalia.model.init import initialize
from castalia.model.transformer import Transformer

TINY = ModelConfig(
    num_layers=2, hidden_size=48, num_heads=6, num_kv_heads=3, vocab_size=90, vocab_multiple=32, max_positions=40
)
TOKENS = torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(0))


def model_of(base: ModelConfig = TINY, exact: bool = False, **update) -> Transformer:
    """In eval mode, with weights large enough that every part shows in the logits."""
    model = Transformer(base.model_copy(update={"init_std": 0.3, "output_init_method": "normal"} | update), exact=exact)
    initialize(model, model.cfg, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1 or parameter.shape[-1] == model.cfg.head_size:  # norms and biases
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "count"),
    [
        (ModelConfig(num_layers=6, hidden_size=128, num_heads=4, vocab_size=50277), 14_067_712),
        (
            ModelConfig(num_layers=44, hidden_size=6144, num_heads=64, vocab_size=50277, vocab_multiple=256),
            20_554_567_680,
        ),
        (
            ModelConfig(
                num_layers=12,
                hidden_size=768,
                num_heads=12,
                vocab_size=50257,
                vocab_multiple=1,
                max_positions=1024,
                position="learned",
                tie_embeddings=True,
            ),
            124_439_808,
        ),
        (
            ModelConfig(
                num_layers=32,
                hidden_size=4096,
                num_heads=32,
                vocab_size=32000,
                mlp_size=11008,
                norm="rmsnorm",
                gated_mlp=True,
                attention_bias=False,
                mlp_bias=False,
            ),
            6_738_415_616,
        ),
    ],
)
def test_parameter_counts_of_known_models(cfg, count):
    with torch.device("meta"):
        model = Transformer(cfg)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_names_and_shapes():
    model = model_of(num_layers=1, num_kv_heads=6, qk_norm=True, gated_mlp=True, position="learned", mlp_size=64)
    block = {
        "norm1.weight": [48], "norm1.bias": [48], "norm2.weight": [48], "norm2.bias": [48],
        "attn.qkv.weight": [144, 48], "attn.qkv.bias": [144], "attn.out.weight": [48, 48], "attn.out.bias": [48],
        "attn.qk_norm.weight": [6, 8], "attn.qk_norm.bias": [6, 8], "mlp.up.weight": [64, 48], "mlp.up.bias": [64],
        "mlp.gate.weight": [64, 48], "mlp.gate.bias": [64], "mlp.down.weight": [48, 64], "mlp.down.bias": [48],
    }  # fmt: skip
    outer = {
        "embed.weight": [96, 48], "positions.weight": [40, 48], "norm.weight": [48], "norm.bias": [48],
        "head.weight": [96, 48],
    }  # fmt: skip
    expected = outer | {f"blocks.0.{name}": shape for name, shape in block.items()}
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected


def plain_attention(model: Transformer, x: Tensor) -> Tensor:
    """The first block's attention by its definition: every head and every pair of tokens, no rotary."""
    cfg, attn = model.cfg, model.blocks["0"].attn
    n, kv, d, t = cfg.num_heads, cfg.kv_heads, cfg.head_size, x.shape[1]
    rows = attn.qkv(x).unflatten(-1, (kv, n // kv + 2, d))
    q, k, v = rows[..., :-2, :].flatten(2, 3), rows[..., -2, :], rows[..., -1, :]
    if cfg.qk_norm:
        q, k = (F.layer_norm(part, (n, d), attn.qk_norm.weight, attn.qk_norm.bias, cfg.norm_eps) for part in (q, k))
    slopes = {6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], 4: [2**-2, 2**-4, 2**-6, 2**-8]}[n]
    heads = []
    for head in range(n):
        source = head // (n // kv)
        scores = q[:, :, head] @ k[:, :, source].mT / math.sqrt(d)
        for i in range(t):
            for j in range(t):
                if cfg.position == "alibi":
                    scores[:, i, j] -= slopes[head] * (i - j)
                if j > i or cfg.sliding_window is not None and i - j > cfg.sliding_window:
                    scores[:, i, j] = -torch.inf
        heads.append(scores.softmax(-1) @ v[:, :, source])
    return attn.out(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("position", ["none", "alibi"])
@pytest.mark.parametrize("window", [None, 4, 19])
@pytest.mark.parametrize(("heads", "qk_norm"), [((6, 3), False), ((6, 6), False), ((4, 1), False), ((6, 6), True)])
@torch.no_grad()
def test_attention_by_its_definition(position, window, heads, qk_norm):
    model = model_of(
        num_layers=1,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        position=position,
        sliding_window=window,
        qk_norm=qk_norm,
    )
    seen = {}
    model.blocks["0"].attn.register_forward_hook(lambda _, args, result: seen.update(x=args[0], result=result))
    model(TOKENS)
    close(seen["result"], plain_attention(model, seen["x"]))


def test_qk_norm_refuses_grouped_heads():
    with pytest.raises(ConfigError, match="num_kv_heads=3 must equal model.num_heads=6"):
        model_of(qk_norm=True)


def centered(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("update", "formula"),
    [
        ({"norm": "layernorm"}, lambda x, w, b: centered(x) / (mean_square(centered(x)) + 0.1).sqrt() * w + b),
        ({"norm": "layernorm_no_params"}, lambda x, w, b: centered(x) / (mean_square(centered(x)) + 0.1).sqrt()),
        ({"norm": "rmsnorm"}, lambda x, w, b: x / (mean_square(x) + 0.1).sqrt() * w),
        ({"norm": "rmsnorm", "rms_eps_inside": False}, lambda x, w, b: x / (mean_square(x).sqrt() + 0.1) * w),
        ({"norm": "scalenorm"}, lambda x, w, b: x / (48 * mean_square(x)).sqrt() * w),
    ],
)
def test_norms(update, formula):
    norm = model_of(norm_eps=0.1, **update).norm
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1))
    values = norm.state_dict()
    close(norm(x), formula(x, values.get("weight"), values.get("bias")))


def test_scalenorm_of_a_short_vector():
    norm = model_of(norm="scalenorm", norm_eps=0.1).norm
    x = torch.full((1, 48), 1e-3)
    close(norm(x), x / 0.1 * norm.weight)


@torch.no_grad()
def test_residual_styles():
    x = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(1))

    def output(**options):
        model = model_of(num_layers=1, position="none", **options)
        block, seen = model.blocks["0"], {}
        block.register_forward_hook(lambda _, args, result: seen.update(x=args[0], context=args[1], y=result))
        model(TOKENS)
        return block, seen["x"], seen["y"], lambda z: block.attn(z, seen["context"])

    block, x, y, attend = output()
    middle = x + attend(block.norm1(x))
    close(y, middle + block.mlp(block.norm2(middle)))
    block, x, y, attend = output(parallel_residual=True)
    close(y, x + attend(block.norm1(x)) + block.mlp(block.norm2(x)))
    block, x, y, attend = output(parallel_residual=True, shared_norm=True)
    assert block.norm2 is None
    close(y, x + attend(block.norm1(x)) + block.mlp(block.norm1(x)))
    block, x, y, attend = output(parallel_residual=True, mlp_bias=False, exact=True)
    close(y, x + block.mlp(block.norm2(x)))
    block, x, y, attend = output(parallel_residual=True, mlp_bias=False)
    close(y, x + attend(block.norm1(x)) + block.mlp(block.norm2(x)))


@torch.no_grad()
def test_sinusoidal_positions_are_added_to_the_embedding():
    model, seen = model_of(position="sinusoidal"), {}
    model.blocks["0"].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model(TOKENS)
    added = seen["x"] - model.embed(TOKENS)
    angles = [[p / 10000 ** (2 * i / 48) for i in range(24)] for p in range(20)]
    rows = [[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles]
    close(added, torch.tensor(rows).expand(2, -1, -1))


@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal", "alibi", "none"])
@torch.no_grad()
def test_causal_and_aware_of_order(position):
    model = model_of(position=position)
    before = model(TOKENS)
    edited = TOKENS.clone()
    edited[:, 10] = (edited[:, 10] + 1) % 90
    after = model(edited)
    close(after[:, :10], before[:, :10])
    assert ((after - before)[:, 10:].abs().amax(-1) > 1e-3).all()
    swapped = TOKENS[:, [1, 0, *range(2, 20)]]
    shallow = model_of(position=position, num_layers=1)
    same = torch.allclose(shallow(swapped)[:, -1], shallow(TOKENS)[:, -1], atol=1e-5)
    assert same == (position == "none")


@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal", "alibi", "none"])
@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_documents_equal_each_document_alone(position, window):
    model = model_of(position=position, sliding_window=window)
    documents = torch.tensor([[0] * 7 + [1] * 13, [5] * 12 + [6] * 5 + [7] * 3])
    together = model(TOKENS, documents=documents)
    for row in range(2):
        for number in documents[row].unique():
            part = documents[row] == number
            close(together[row, part], model(TOKENS[row, part][None])[0])


@torch.no_grad()
def test_rotary_sees_only_distances_and_positions_can_be_given():
    model = model_of()
    close(model(TOKENS, positions=torch.arange(7, 27)[None]), model(TOKENS))
    learned = model_of(position="learned")
    assert not torch.allclose(learned(TOKENS, positions=torch.arange(7, 27)[None]), learned(TOKENS))
    with pytest.raises(ConfigError, match="max_positions=40"):
        learned(torch.zeros(1, 41, dtype=torch.long))


def test_loss_is_that_of_the_logits():
    for tied in (False, True):
        model = model_of(tie_embeddings=tied)
        labels = TOKENS.roll(-1, 1)
        labels[:, -3:] = -100
        total, count = model(TOKENS, labels)
        expected = F.cross_entropy(model(TOKENS).flatten(0, 1), labels.flatten(), reduction="sum")
        close(total, expected)
        assert count == 34
        gradients = torch.autograd.grad(total, list(model.parameters()))
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_16_bit_computation_keeps_fp32_parameters():
    wide, narrow = model_of(), model_of()
    narrow.compute_dtype = torch.bfloat16
    logits = narrow(TOKENS)
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - wide(TOKENS)).abs().max() / wide(TOKENS).std()
    assert 0 < error < 0.2
    total, _ = narrow(TOKENS, TOKENS)
    total.backward()
    assert total.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in narrow.parameters()} == {torch.float32}
    assert wide.to(torch.bfloat16)(TOKENS).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "update",
    [
        {"position": "learned", "tie_embeddings": True},
        {"norm": "rmsnorm", "rms_eps_inside": False, "gated_mlp": True, "activation": "silu"},
        {"norm": "scalenorm", "position": "alibi", "num_kv_heads": 6, "qk_norm": True},
        {"position": "sinusoidal", "embedding_dropout": 0.1, "reward_head": True},
    ],
)
@torch.no_grad()
def test_parameters_in_the_compute_dtype_change_no_bit(update, dtype):
    model = model_of(**update)
    model.compute_dtype = dtype
    labels, losses = TOKENS.roll(-1, 1), []
    for each in (model, model.to(dtype)):
        losses.append(each(TOKENS, labels, per_sequence=True))
        if not model.cfg.reward_head:
            losses.append(each(TOKENS, labels)[0])
    half = len(losses) // 2
    assert all(torch.equal(a, b) for a, b in zip(losses[:half], losses[half:], strict=True))


@torch.no_grad()
def test_stages_of_a_pipeline_equal_the_whole():
    for tied in (False, True):
        whole, first, last = (model_of(tie_embeddings=tied) for _ in range(3))
        del first.blocks["1"]
        first.norm = first.head = None
        del last.blocks["0"]
        last.positions = None
        if not tied:
            last.embed = None
        hidden = first(TOKENS)
        assert hidden.shape == (2, 20, 48)
        assert torch.equal(last(hidden), whole(TOKENS))
        assert torch.equal(last(hidden, TOKENS)[0], whole(TOKENS, TOKENS)[0])


@pytest.mark.parametrize("position", ["rotary", "alibi"])
@torch.no_grad()
def test_shards_of_the_heads_sum_to_the_whole(position):
    """Attention with a part of the heads' rows works unchanged: what tensor parallelism needs."""
    model, seen = model_of(num_layers=1, position=position, attention_bias=False), {}
    attn = model.blocks["0"].attn
    hook = attn.register_forward_hook(lambda _, args, result: seen.update(args=args, result=result))
    model(TOKENS)
    hook.remove()
    whole_qkv, whole_out, (x, context) = attn.qkv.weight.data, attn.out.weight.data, seen["args"]
    parts = []
    for rank in range(3):
        attn.qkv.weight.data, attn.out.weight.data = whole_qkv.chunk(3)[rank], whole_out.chunk(3, dim=1)[rank]
        bias = None if context.bias is None else context.bias.chunk(3, dim=1)[rank]
        parts.append(attn(x, context._replace(bias=bias)))
    close(sum(parts), seen["result"])


def test_built_on_the_meta_device():
    with torch.device("meta"):
        model = Transformer(TINY)
    model.to_empty(device="cpu")
    initialize(model, TINY, seed=1)
    expected = Transformer(TINY)
    initialize(expected, TINY, seed=1)
    assert torch.equal(model(TOKENS), expected(TOKENS))


@pytest.mark.parametrize("kind", ["embedding_dropout", "hidden_dropout", "attention_dropout"])
@torch.no_grad()
def test_dropout_acts_in_training_only(kind):
    plain, model = model_of(), model_of(**{kind: 0.5})
    assert torch.equal(model(TOKENS), plain(TOKENS))
    model.train()
    assert not torch.allclose(model(TOKENS), plain(TOKENS))
    assert not torch.allclose(model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "mish", "softsign", "sigmoid", "identity"])
@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_activations(activation, gated):
    formulas = {
        "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3))),
        "relu": lambda x: x.clamp(min=0),
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "mish": lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))),
        "softsign": lambda x: x / (1 + x.abs()),
        "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
        "identity": lambda x: x,
    }
    mlp = model_of(activation=activation, gated_mlp=gated).blocks["0"].mlp
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    act, up = formulas[activation], x @ mlp.up.weight.T + mlp.up.bias
    inner = act(x @ mlp.gate.weight.T + mlp.gate.bias) * up if gated else act(up)
    close(mlp(x), inner @ mlp.down.weight.T + mlp.down.bias)


def test_z_loss_belongs_to_training_alone():
    plain, with_z = Transformer(TINY), Transformer(TINY, z_loss=0.1)
    for model in (plain, with_z):
        initialize(model, TINY, seed=1)
    loss, expected = (model(TOKENS, TOKENS)[0] for model in (with_z, plain))
    torch.testing.assert_close(loss - expected, 0.1 * plain(TOKENS).logsumexp(-1).square().sum(), atol=1e-2, rtol=0)
    assert with_z.eval()(TOKENS, TOKENS)[0] == plain.eval()(TOKENS, TOKENS)[0]
