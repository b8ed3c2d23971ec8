"""The optimizer with its groups of parameters, and fp16's loss scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from castalia.config.schema import OptimizerConfig, ParameterGroup
from castalia.config.tensor_table import block_of, in_one_block, row_of
from castalia.errors import ConfigError
from castalia.parallel.executor import mesh_of
from castalia.reading import fits
from castalia.train.update_rules import AdamW, AnyOptimizer, CombinedOptimizer, Lion, OneOptimizer

DUPLICATE = "duplicate."  # begins the names of this rank's second copies of parameters that live on another stage


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    cfg: OptimizerConfig,
    *,
    summed_bias_ranks: int = 1,
    width_multiplier: float = 1.0,
    num_layers: int = 0,
    elsewhere: Collection[str] = (),
) -> AnyOptimizer:
    """The optimizer of the parameters that train, with its state: memory is taken at once, and step 0 can be saved.

    `summed_bias_ranks` multiplies the learning rate of row-parallel biases: where GPT-NeoX adds T copies of such a
    bias, each of them takes a full step. `width_multiplier` is muP's: the model's width over the width that the rates
    were found at. `elsewhere`: names of the tensors that train on any rank, which patterns may match, too.
    Raises ConfigError if an entry of `optimizer.groups` matches nothing.
    """
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    for group in cfg.groups:
        names = [*trained, *elsewhere]
        if not any(fits(group.match, name) for name in names):
            known = ", ".join(in_one_block(names))
            raise ConfigError(f"optimizer.groups: {group.match!r} matches no tensor that trains; there are {known}")
    # By update rule, then by decay, learning-rate factor and the ranks that hold it, as no product takes tensors of
    # different meshes: each combination is one parameter group.
    kinds: dict[str, dict[tuple[float, float, object], list[nn.Parameter]]] = defaultdict(lambda: defaultdict(list))
    for name, parameter in trained.items():
        rule = update_rule(name, cfg, width_multiplier, num_layers, summed_bias_ranks)
        kind, decay, scale = rule.kind, rule.decay, rule.scale
        kinds[kind][decay, scale, mesh_of(parameter)].append(parameter)
    optimizers: list[OneOptimizer] = []
    for kind, groups in kinds.items():
        param_groups: list[dict[str, Any]] = [
            {"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale, _), ps in groups.items()
        ]
        optimizers.append(_optimizer(kind, param_groups, cfg))
        for parameter in (p for group in param_groups for p in group["params"]):
            # torch itself would create it in the first step.
            optimizers[-1].state[parameter] = _fresh_state(kind, parameter, cfg)
    return optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(optimizers)


class UpdateRule(NamedTuple):
    """How the optimizer changes one tensor."""

    kind: str  # adamw, lion, sgd, adafactor or muon
    decay: float  # weight decay, multiplied by the tensor's learning rate
    scale: float  # the tensor's learning rate over that of the schedule


def update_rule(
    name: str, cfg: OptimizerConfig, width_multiplier: float = 1.0, num_layers: int = 0, summed_bias_ranks: int = 1
) -> UpdateRule:
    """The rule of a tensor, from the first entry of `optimizer.groups` that matches its name.

    Under muP (2203.03466) adaptive rules take smaller steps in hidden matrices, and SGD larger ones in all other
    tensors. torch multiplies decay by the rate, so decay is divided by the factor: its effect stays the same.
    The other arguments are those of `make_optimizer`.
    """
    tensor = name.removeprefix(DUPLICATE)
    row, last_block = row_of(tensor), num_layers - 1
    group = next((entry for entry in cfg.groups if fits(entry.match, name)), ParameterGroup(match=name))
    wanted = cfg.weight_decay if group.weight_decay is None else group.weight_decay
    decay = wanted if row.decays or group.weight_decay is not None else 0.0
    matrices, others = (1.0, width_multiplier) if cfg.name == "sgd" else (1 / width_multiplier, 1.0)
    factor = matrices if row.mup == "matrix" else others
    scale = group.lr_scale * factor
    scale *= cfg.layer_decay ** (last_block - min(block_of(tensor), last_block))  # once for each block above
    if row.row_parallel_bias:  # GPT-NeoX's copies, see `make_optimizer`
        scale *= summed_bias_ranks
    kind: str = "adamw" if cfg.name == "muon" and row.mup == "vector" else cfg.name
    return UpdateRule(kind, decay / factor, scale)


def _optimizer(kind: str, groups: list[dict[str, Any]], cfg: OptimizerConfig) -> OneOptimizer:
    match kind:
        case "lion":
            return Lion(groups, lr=cfg.lr, betas=cfg.betas)
        case "sgd":
            return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=cfg.lr)
        case "muon":  # scaled to AdamW's step size, so that one rate and one decay suit both
            return torch.optim.Muon(groups, lr=cfg.lr, momentum=cfg.momentum, adjust_lr_fn="match_rms_adamw")
    return AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)


def _fresh_state(kind: str, parameter: nn.Parameter, cfg: OptimizerConfig) -> dict[str, Tensor]:
    if kind == "lion":
        return {"exp_avg": torch.zeros_like(parameter)}
    if kind in ("sgd", "muon"):
        return {"momentum_buffer": torch.zeros_like(parameter)} if cfg.momentum else {}
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    if kind == "adamw":
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    if parameter.dim() == 1:  # Adafactor factors the variance of matrices alone
        return {"step": step, "variance": torch.zeros_like(parameter)}
    *outer, rows, columns = parameter.shape
    row_var, col_var = parameter.new_zeros(*outer, rows, 1), parameter.new_zeros(*outer, 1, columns)
    return {"step": step, "row_var": row_var, "col_var": col_var}


def rescale_moments(optimizer: AnyOptimizer, old: int, new: int) -> None:
    """Rescales Adam's moments from gradients that are sums over `old` micro-batches to sums over `new`; 1: means."""
    for state in optimizer.state.values() if old != new else ():
        if "exp_avg" in state:
            state["exp_avg"].mul_(new).div_(old)
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].mul_(new**2).div_(old**2)


def set_rate(optimizer: AnyOptimizer, rate: float) -> None:
    """Sets the learning rate of each parameter group: `rate` times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
