import subprocess
import sys

import pytest
import torch
from torch import nn

from castalia.config.schema import LossScaleConfig, ModelConfig, OptimizerConfig
from castalia.config.tensor_table import row_of
from castalia.errors import ConfigError, TrainingError
from castalia.model.transformer import Transformer
from castalia.train.loss_scale import LossScaler
from castalia.train.optimizer import make_optimizer, set_rate

SMALL = ModelConfig(
    num_layers=1, hidden_size=8, num_heads=2, vocab_size=16, vocab_multiple=1, qk_norm=True, max_positions=8
)


def test_only_norms_and_biases_do_not_decay():
    model = Transformer(SMALL.model_copy(update={"position": "learned"}))
    kept = {name for name, _ in model.named_parameters() if row_of(name).decays}
    matrices = {"attn.qkv", "attn.out", "mlp.up", "mlp.down"}
    assert kept == {"embed.weight", "positions.weight", "head.weight"} | {f"blocks.0.{m}.weight" for m in matrices}


def test_adamw_follows_the_documented_formula():
    torch.manual_seed(0)
    model = Transformer(SMALL)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    cfg = OptimizerConfig(lr=0.1, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.3)
    optimizer = make_optimizer(dict(model.named_parameters()), cfg, summed_bias_ranks=2)
    expected = {name: (p.detach().double(), 0.0, 0.0) for name, p in model.named_parameters()}
    for step in range(1, 4):
        set_rate(optimizer, rate := 0.1 / step)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            p, m, v = expected[name]
            g = parameter.grad.double()
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            direction = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-3)
            decay = 0.3 if row_of(name).decays else 0.0
            scale = 2 if name in ("blocks.0.attn.out.bias", "blocks.0.mlp.down.bias") else 1
            expected[name] = p - rate * scale * (direction + decay * p), m, v
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name][0], atol=1e-6, rtol=1e-5)


def test_adamw_gives_the_bits_of_torch_and_needs_no_compiler():
    code = (
        "import sys, torch; from castalia.train.update_rules import AdamW; torch.manual_seed(0)\n"
        "def made(rule, **more):\n"
        "    weights = [torch.nn.Parameter(torch.ones(5, 3) * n) for n in (1, 2)]\n"
        "    rule = rule([{'params': weights, 'weight_decay': 0.1}], lr=0.01, betas=(0.9, 0.95), eps=1e-8, **more)\n"
        "    for p in weights: rule.state[p] = dict(\n"
        "        step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))\n"
        "    return weights, rule\n"
        "def stepped(weights, rule, gradients):\n"
        "    for gradient in gradients:\n"
        "        for p in weights: p.grad = gradient * p.detach()\n"
        "        rule.step(); rule.zero_grad()\n"
        "    return torch.stack(weights)\n"
        "gradients = torch.randn(3, 5, 3); ours = stepped(*made(AdamW), gradients)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "assert ours.equal(stepped(*made(torch.optim.AdamW, fused=True), gradients)) and not ours[0].equal(ours[1])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_state_exists_before_the_first_step():
    optimizer = make_optimizer(dict(Transformer(SMALL).named_parameters()), OptimizerConfig())
    states = list(optimizer.state.values())
    assert len(states) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in states)


def moved(settings: dict, steps: int = 1, **others) -> dict[str, torch.Tensor]:
    """How far each tensor goes from ones, with gradients of 1, 2, ..."""
    model = Transformer(SMALL)
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(parameters, OptimizerConfig(lr=0.5, **settings), **others)
    for parameter in parameters.values():
        nn.init.ones_(parameter)
    for step in range(1, steps + 1):
        set_rate(optimizer, 0.5)
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, float(step))
        optimizer.step()
    return {name: parameter.detach() - 1 for name, parameter in parameters.items()}


def test_lion_moves_by_the_sign_of_its_moment_and_decays_matrices():
    one = moved({"name": "lion", "weight_decay": 0.25})
    assert (one["norm.bias"] == -0.5).all()
    assert (one["embed.weight"] == -0.5 - 0.5 * 0.25).all()
    opposite = Transformer(SMALL)
    optimizer = make_optimizer(
        dict(opposite.named_parameters()), OptimizerConfig(name="lion", lr=0.5, betas=(0.9, 0.5))
    )
    moment = optimizer.state[opposite.norm.weight]["exp_avg"]
    for gradient, direction, expected in ((1.0, -1, 0.5), (-1.0, -1, -0.25), (-8.0, 1, -4.125)):
        before = opposite.norm.weight.detach().clone()
        opposite.norm.weight.grad = torch.full_like(before, gradient)
        optimizer.step()
        assert (moment == expected).all()
        assert (opposite.norm.weight - before == 0.5 * direction).all()


def test_sgd_adds_up_its_momentum():
    decay = {"name": "sgd", "weight_decay": 0.0}
    assert (moved({**decay, "momentum": 0.5}, steps=2)["embed.weight"] == -0.5 * (1 + 2.5)).all()
    assert (moved({**decay, "momentum": 0.0}, steps=2)["embed.weight"] == -0.5 * (1 + 2)).all()


def test_muon_turns_the_blocks_matrices_and_leaves_the_rest_to_adamw():
    model = Transformer(SMALL)
    optimizer = make_optimizer(dict(model.named_parameters()), OptimizerConfig(name="muon"))
    turned = {name for name, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert turned == {f"blocks.0.{m}.weight" for m in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")}
    far = moved({"name": "muon", "weight_decay": 0.0})
    ours, adamw = far["blocks.0.mlp.up.weight"], far["embed.weight"]
    assert ours.square().mean().sqrt() == pytest.approx(0.5 * 0.2 * 32**0.5 / (8 * 32) ** 0.5, rel=0.4)  # rank one
    torch.testing.assert_close(adamw, torch.full_like(adamw, -0.5))


def test_adafactor_steps_are_relative_to_the_weights():
    far = moved({"name": "adafactor", "weight_decay": 0.0})
    torch.testing.assert_close(far["blocks.0.mlp.up.weight"], torch.full((32, 8), -0.5))


def test_groups_have_rates_and_decays_of_their_own():
    groups = [{"match": "embed|head", "lr_scale": 0.1, "weight_decay": 0.0}, {"match": "norm", "weight_decay": 0.5}]
    far = moved({"name": "lion", "groups": groups, "weight_decay": 0.25})
    for name, expected in (("head.weight", -0.05), ("norm.weight", -0.75), ("blocks.0.mlp.up.weight", -0.625)):
        torch.testing.assert_close(far[name], torch.full_like(far[name], expected))
    with pytest.raises(ConfigError, match=r"'hat' matches no tensor.*blocks.0.attn.qkv.weight"):
        moved({"groups": [{"match": "hat"}]})


@pytest.mark.parametrize(
    "name, matrix, vector", [("adamw", 0.25, 1.0), ("lion", 0.25, 1.0), ("sgd", 1.0, 4.0)], ids=["adamw", "lion", "sgd"]
)
def test_rates_follow_the_width(name, matrix, vector):
    narrow, wide = ({**moved({"name": name, "weight_decay": 0.0}, width_multiplier=m)} for m in (1.0, 4.0))
    for tensor, factor in (("blocks.0.attn.qkv.weight", matrix), ("embed.weight", vector), ("norm.bias", vector)):
        torch.testing.assert_close(wide[tensor], narrow[tensor] * factor)
    decayed = moved({"name": name, "weight_decay": 0.1}, width_multiplier=4.0)["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(decayed, wide["blocks.0.attn.qkv.weight"] - 0.5 * 0.1)  # as without muP


def scales(scaler, overflows):
    """The scale in force at each step."""
    seen = []
    for overflow in overflows:
        seen.append(scaler.scale)
        scaler.update(overflow == "x")
    return [*seen, scaler.scale]


def test_zero_rule_spends_hysteresis_then_halves_and_refills_it_when_it_grows():
    scaler = LossScaler(LossScaleConfig(initial=16, window=3, hysteresis=2), "zero")
    # step:      0   1   2   3   4   5   6   7   8   9
    # overflow:              x       x              x
    # last:     -1             3      5              9       growth at n - last = 3: steps 2 and 8
    assert scales(scaler, "...x.x...x") == [16, 16, 16, 32, 32, 32, 16, 16, 16, 32, 32]
    assert scaler.state() == {"cur_scale": 32, "cur_iter": 10, "last_overflow_iter": 9, "cur_hysteresis": 1}


def test_zero_rule_with_consecutive_hysteresis_forgives_after_every_good_step():
    cfg = LossScaleConfig(initial=16, window=100, hysteresis=2, consecutive_hysteresis=True)
    assert scales(LossScaler(cfg, "zero"), "x.x.xx") == [16, 16, 16, 16, 16, 16, 8]
    plain = cfg.model_copy(update={"consecutive_hysteresis": False})
    assert scales(LossScaler(plain, "zero"), "x.x.xx") == [16, 16, 16, 8, 8, 4, 2]


def test_zero_rule_ends_the_run_at_the_smallest_scale():
    scaler = LossScaler(LossScaleConfig(initial=2, window=100, hysteresis=1, minimum=1), "zero")
    assert scales(scaler, "x") == [2, 1]
    with pytest.raises(TrainingError, match="step 2 overflows at the smallest loss scale"):
        scaler.update(True)


def test_stage0_rule_halves_at_once_and_grows_a_step_later():
    scaler = LossScaler(LossScaleConfig(initial=16, window=3, hysteresis=2), "stage0")
    # step:      0   1   2   3   4  5   6   7   8   9  10       growth at n - last - 1 = 3, 6, ...: steps 3 and 9
    # overflow:                     x
    assert scales(scaler, ".....x.....") == [16, 16, 16, 16, 32, 32, 16, 16, 16, 16, 32, 32]
    floor = LossScaler(LossScaleConfig(initial=2, minimum=1), "stage0")
    assert scales(floor, "xxx") == [2, 1, 1, 1]


def test_a_static_scale_never_moves():
    assert scales(LossScaler(LossScaleConfig(static=128, window=1), "zero"), "..x.") == [128] * 5


@pytest.mark.parametrize("rule", ["zero", "stage0"])
def test_a_restored_scaler_goes_on_as_if_nothing_had_happened(rule):
    cfg, story = LossScaleConfig(initial=2.0**10, window=4), "..x.....x.x......x....."
    whole, first, second = (LossScaler(cfg, rule) for _ in range(3))
    expected = scales(whole, story)
    scales(first, story[:9])
    second.restore(first.state())
    assert scales(second, story[9:]) == expected[9:]
