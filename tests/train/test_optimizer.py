import pytest
import torch
from torch import nn

from castalia.config.schema import LossScale, Model, Optimizer
from castalia.errors import TrainingError
from castalia.model.transformer import Transformer
from castalia.train.optimizer import LossScaler, decays, gradient_norm, make_optimizer, set_rate

SMALL = Model(num_layers=1, hidden_size=8, num_heads=2, vocab_size=16, vocab_multiple=1, qk_norm=True, max_positions=8)


def test_only_norms_and_biases_do_not_decay():
    model = Transformer(SMALL.model_copy(update={"position": "learned"}))
    kept = {name for name, _ in model.named_parameters() if decays(name)}
    matrices = {"attn.qkv", "attn.out", "mlp.up", "mlp.down"}
    assert kept == {"embed.weight", "positions.weight", "head.weight"} | {f"blocks.0.{m}.weight" for m in matrices}


def test_adamw_follows_the_documented_formula():
    torch.manual_seed(0)
    model = Transformer(SMALL)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    cfg = Optimizer(lr=0.1, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.3)
    optimizer = make_optimizer(model, cfg, summed_bias_ranks=2)
    expected = {name: (p.detach().double(), 0.0, 0.0) for name, p in model.named_parameters()}
    for step in range(1, 4):
        set_rate(optimizer, rate := 0.1 / step)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            p, m, v = expected[name]
            g = parameter.grad.double()
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            direction = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-3)
            decay = 0.3 if decays(name) else 0.0
            scale = 2 if name in ("blocks.0.attn.out.bias", "blocks.0.mlp.down.bias") else 1
            expected[name] = p - rate * scale * (direction + decay * p), m, v
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name][0], atol=1e-6, rtol=1e-5)


def test_state_exists_before_the_first_step():
    optimizer = make_optimizer(Transformer(SMALL), Optimizer())
    states = list(optimizer.state.values())
    assert len(states) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in states)


def test_gradient_norm_is_not_finite_where_an_element_is_not():
    assert gradient_norm([torch.tensor([3.0]), torch.tensor([4.0])]) == 5.0
    assert not gradient_norm([torch.ones(3), torch.tensor([1.0, float("inf")])]).isfinite()


def scales(scaler, overflows):
    """The scale in force at each step."""
    seen = []
    for overflow in overflows:
        seen.append(scaler.scale)
        scaler.update(overflow == "x")
    return [*seen, scaler.scale]


def test_zero_rule_spends_hysteresis_then_halves_and_refills_it_when_it_grows():
    scaler = LossScaler(LossScale(initial=16, window=3, hysteresis=2), "zero")
    # step:      0   1   2   3   4   5   6   7   8   9
    # overflow:              x       x              x
    # last:     -1             3      5              9       growth at n - last = 3: steps 2 and 8
    assert scales(scaler, "...x.x...x") == [16, 16, 16, 32, 32, 32, 16, 16, 16, 32, 32]
    assert scaler.state() == {"cur_scale": 32, "cur_iter": 10, "last_overflow_iter": 9, "cur_hysteresis": 1}


def test_zero_rule_with_consecutive_hysteresis_forgives_after_every_good_step():
    cfg = LossScale(initial=16, window=100, hysteresis=2, consecutive_hysteresis=True)
    assert scales(LossScaler(cfg, "zero"), "x.x.xx") == [16, 16, 16, 16, 16, 16, 8]
    plain = cfg.model_copy(update={"consecutive_hysteresis": False})
    assert scales(LossScaler(plain, "zero"), "x.x.xx") == [16, 16, 16, 8, 8, 4, 2]


def test_zero_rule_ends_the_run_at_the_smallest_scale():
    scaler = LossScaler(LossScale(initial=2, window=100, hysteresis=1, minimum=1), "zero")
    assert scales(scaler, "x") == [2, 1]
    with pytest.raises(TrainingError, match="step 2 overflows at the smallest loss scale"):
        scaler.update(True)


def test_stage0_rule_halves_at_once_and_grows_a_step_later():
    scaler = LossScaler(LossScale(initial=16, window=3, hysteresis=2), "stage0")
    # step:      0   1   2   3   4  5   6   7   8   9  10       growth at n - last - 1 = 3, 6, ...: steps 3 and 9
    # overflow:                     x
    assert scales(scaler, ".....x.....") == [16, 16, 16, 16, 32, 32, 16, 16, 16, 16, 32, 32]
    floor = LossScaler(LossScale(initial=2, minimum=1), "stage0")
    assert scales(floor, "xxx") == [2, 1, 1, 1]


def test_a_static_scale_never_moves():
    assert scales(LossScaler(LossScale(static=128, window=1), "zero"), "..x.") == [128] * 5


@pytest.mark.parametrize("rule", ["zero", "stage0"])
def test_a_restored_scaler_goes_on_as_if_nothing_had_happened(rule):
    cfg, story = LossScale(initial=2.0**10, window=4), "..x.....x.x......x....."
    whole, first, second = (LossScaler(cfg, rule) for _ in range(3))
    expected = scales(whole, story)
    scales(first, story[:9])
    second.restore(first.state())
    assert scales(second, story[9:]) == expected[9:]
