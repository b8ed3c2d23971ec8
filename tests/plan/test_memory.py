"""The memory that plan predicts is the memory that a training step allocates, byte by byte."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from castalia.config.float8_matrices import float8_matrices
from castalia.config.scan_chunks import CHUNK_VALUES
from castalia.config.schema import FinetuneConfig, LoraConfig, ModelConfig, OptimizerConfig, PreferenceConfig
from castalia.model import transformer
from castalia.model.float8 import set_float8
from castalia.model.lora import add_adapters, freeze
from castalia.model.transformer import Transformer
from castalia.parallel.activation_checkpointing import apply_activation_checkpointing, compute_again
from castalia.plan.count import count
from castalia.plan.layout import Layout, Stage, problem, stages
from castalia.plan.memory import Compute, Rank, activations, attending, memory_by_stage, moments_of
from castalia.train.hardware import name_of
from castalia.train.optimizer import make_optimizer
from castalia.train.preference import dpo, reward_model
from castalia.train.step_memory import PeakMemory

LENGTH = 128
BASE = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "vocab_size": 1024, "max_positions": LENGTH}
FAMILIES = {
    "neox": {"parallel_residual": True, "rotary_pct": 0.25},
    "gpt2": {"position": "learned", "tie_embeddings": True},
    "llama": {"norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "num_kv_heads": 2, "mlp_size": 176},
    "experts": {"experts": {"count": 4, "top_k": 2, "every": 2}},
    "gated experts and a shared one": {
        "experts": {"count": 4, "top_k": 2, "width": 64, "gated": True, "router": "balanced", "shared_width": 96},
    },
    "gmlp": {"pattern": ("gmlp", "attention", "amlp"), "amlp_size": 16},
    "mamba": {"pattern": ("mamba", "attention")},
    "pure mamba": {"pattern": ("mamba",), "norm": "rmsnorm"},
    "rwkv": {"pattern": ("rwkv", "attention")},
    "pure rwkv": {"pattern": ("rwkv",), "position": "none"},
    "small vocabulary": {"vocab_size": 128, "num_layers": 6},
    "large vocabulary": {"vocab_size": 50_000, "num_layers": 1},  # several chunks of logits
}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads would only wait for each other on models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(model: ModelConfig, dtype: torch.dtype, finetune: FinetuneConfig) -> Transformer:
    transformer = Transformer(model, compute_dtype=dtype)
    add_adapters(transformer, finetune.lora)
    freeze(transformer, finetune)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return transformer


def peak_bytes(
    model: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    compute: Compute | None = None,
    again: frozenset[int] = frozenset(),
) -> int:
    """Most bytes that tensors hold during a training step, parameters and optimizer state included.

    `again`: with recompute=auto, the blocks that are computed again.
    """
    compute = compute or Compute()
    transformer = build(model, dtype, compute.finetune)
    if compute.float8:
        set_float8(transformer, float8_matrices(model, tp=1)[0])
    reference = build(model, dtype, FinetuneConfig()) if compute.reference else None
    apply_activation_checkpointing(transformer, layout.recompute, dropout=False)
    if layout.recompute == "auto":
        compute_again([transformer], again)
    optimizer = make_optimizer(dict(transformer.named_parameters()), OptimizerConfig())
    state = sum(4 * (3 if p.requires_grad else 1) * p.numel() for p in transformer.parameters())
    state += sum(4 * p.numel() for p in reference.parameters()) if reference else 0

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        if compute.objective == "causal":
            return transformer(tokens, labels=tokens)[0]
        with torch.no_grad():
            logps = reference(tokens, labels=tokens, per_sequence=True) if reference else torch.zeros(len(tokens))
        values = transformer(tokens, labels=tokens, per_sequence=True)
        if compute.objective == "reward":
            return reward_model(values, 0.0).losses.sum()
        return dpo(values, logps, torch.full_like(values, LENGTH), PreferenceConfig()).losses.sum()

    def step() -> None:
        tokens = torch.randint(0, 100, (compute.sides * layout.micro_batch, LENGTH))
        for _ in range(layout.accumulation):
            loss(tokens).backward()
        gradients = [p.grad for p in transformer.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / torch.nn.utils.get_total_norm(gradients))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # tables of rotations and the like are made once
    with PeakMemory(torch.device("cpu")) as peak:
        step()
    return state + peak.bytes


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_takes_the_planned_memory(family, dtype, recompute) -> None:
    model = ModelConfig(**(BASE | FAMILIES[family]))
    compute = Compute(name_of(dtype), "cpu")
    for micro_batch, accumulation in ((3, 1), (2, 2)):
        layout = Layout(micro_batch=micro_batch, accumulation=accumulation, recompute=recompute)
        planned = Rank(model, layout, Stage(0, model.num_layers, True, True), LENGTH, compute).memory().total
        near = 0.1 if model.experts or model.other_kinds else 0.05  # blocks of several kinds count by their mean
        assert planned == pytest.approx(peak_bytes(model, layout, dtype), rel=near), (micro_batch, accumulation)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", ["pure mamba", "pure rwkv"])
def test_so_do_states_between_chunks_which_activation_checkpointing_drops(family, recompute, monkeypatch) -> None:
    """Chunks are so short that their states would be the most of what a block keeps."""
    monkeypatch.setitem(CHUNK_VALUES, "cpu", 1)
    model = ModelConfig(**(BASE | FAMILIES[family] | {"num_heads": 1}))
    layout = Layout(micro_batch=4, recompute=recompute)
    planned = memory_by_stage(model, layout, LENGTH, Compute("fp32", "cpu"))[0].total
    assert planned == pytest.approx(peak_bytes(model, layout, torch.float32), rel=0.1)


ATTENTION = {
    "alibi": {"position": "alibi"},
    "window": {"sliding_window": 16},
    "groups in a window": {"sliding_window": 16, "num_kv_heads": 2},
    "plain": {"attention_dropout": 0.1},
    "plain, alibi": {"attention_dropout": 0.1, "position": "alibi"},
    "plain, groups": {"attention_dropout": 0.1, "num_kv_heads": 2},
}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_so_do_a_bias_and_the_scores_of_the_plain_kernel(kind, dtype, recompute) -> None:
    model = ModelConfig(**(BASE | {"num_heads": 16} | ATTENTION[kind]))
    compute, layout = Compute(name_of(dtype), "cpu"), Layout(micro_batch=2, recompute=recompute)
    planned = memory_by_stage(model, layout, LENGTH, compute)[0].total
    assert planned == pytest.approx(peak_bytes(model, layout, dtype), rel=0.06)


def test_so_do_keys_and_values_that_are_repeated_for_their_groups(monkeypatch) -> None:
    """As the memory-efficient kernel of GPUs wants them; here the CPU's kernel gets them."""
    model, layout = ModelConfig(**(BASE | {"num_kv_heads": 2, "num_heads": 8})), Layout(micro_batch=3)
    on_cpu, on_gpu = (activations(model, layout, 3 * LENGTH, LENGTH, Compute("fp32", d)).whole for d in ("cpu", "cuda"))
    before = peak_bytes(model, layout, torch.float32)
    monkeypatch.setattr(transformer, "capability", lambda _: (8, 0))
    more = peak_bytes(model, layout, torch.float32) - before
    assert more == pytest.approx(model.num_layers * (on_gpu - on_cpu), rel=0.1)
    assert attending(model, layout, 3 * LENGTH, LENGTH, Compute("fp32", "cuda")).choice.repeats


def test_gathering_context_ranks_hold_all_keys_and_their_part_of_a_bias() -> None:
    model = ModelConfig(**(BASE | {"position": "alibi"}))
    parts = {kind: Layout(cp=2, cp_kind=kind, micro_batch=3) for kind in ("gather", "ulysses", "ring")}
    tokens, compute = 3 * LENGTH // 2, Compute("fp32", "cuda")
    one = attending(model, Layout(micro_batch=3), 3 * LENGTH, LENGTH, compute).bias
    assert one == 4 * 4 * LENGTH**2 and attending(model, parts["gather"], tokens, LENGTH, compute).bias == one // 2
    model = ModelConfig(**BASE)
    whole = {kind: activations(model, layout, tokens, LENGTH, compute).whole for kind, layout in parts.items()}
    assert whole["gather"] - whole["ring"] == 2 * 3 * LENGTH * 64 * 4 and whole["ulysses"] == whole["ring"]


def test_masks_and_slow_ways_of_gpus_are_in_the_plan() -> None:
    """Beside the same model with flash: one bias, or scores in every layer where no fast kernel takes the case."""

    def more(capability: tuple[int, int], **update) -> int:
        used, usual = (
            memory_by_stage(model.model_copy(update=changes), Layout(), LENGTH, Compute(capability=device))[0].total
            for changes, device in ((update, capability), ({}, (8, 0)))
        )
        return used - usual

    model, scores = ModelConfig(**BASE), 4 * LENGTH**2
    assert more((9, 0), sliding_window=16) == 2 * LENGTH**2
    assert more((7, 0)) > 3 * 4 * scores  # bf16 on a V100
    model = ModelConfig(**(BASE | {"hidden_size": 240}))
    assert more((8, 0), sliding_window=16) > 3 * 4 * scores  # heads of 60


PARTS = {
    "adapters": {"finetune": FinetuneConfig(lora=LoraConfig(rank=8))},
    "adapters of some": {
        "finetune": FinetuneConfig(lora=LoraConfig(rank=8, dropout=0.1, targets=("attn.qkv", "head")))
    },
    "head alone": {"finetune": FinetuneConfig(train=("^head",))},
    "last block": {"finetune": FinetuneConfig(train=("^blocks.2.", "^norm"))},
    "frozen embedding": {"finetune": FinetuneConfig(freeze=("^embed",))},
    "pairs": {"objective": "dpo", "reference": True},
    "pairs with adapters": {"objective": "dpo", "reference": True, "finetune": FinetuneConfig(lora=LoraConfig(rank=8))},
    "reward": {"objective": "reward"},
}


@pytest.mark.parametrize(
    ("dtype", "recompute"),
    [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "selective"), (torch.float32, "full")],
    ids=["fp32", "bf16", "bf16-selective", "fp32-full"],
)
@pytest.mark.parametrize("part", PARTS)
def test_so_does_a_step_of_which_parts_train_or_that_learns_from_pairs(part, dtype, recompute) -> None:
    compute = Compute(name_of(dtype), "cpu", **PARTS[part])
    for family in ({"parallel_residual": True}, FAMILIES["llama"]):
        model = ModelConfig(**(BASE | family), reward_head=compute.objective == "reward")
        layout = Layout(micro_batch=3, recompute=recompute)
        planned = memory_by_stage(model, layout, LENGTH, compute)[0].total
        # Too much is planned for adapters' gradients in a block that is computed again.
        assert 0.9 < planned / peak_bytes(model, layout, dtype, compute) < 1.14, family


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["gmlp", "mamba", "pure mamba", "pure rwkv"])
def test_so_does_a_step_with_adapters_on_other_kinds(family, recompute) -> None:
    compute = Compute("bf16", "cpu", finetune=FinetuneConfig(lora=LoraConfig(rank=8)))
    # The first block keeps less, as what enters it has no gradient; the plan takes all blocks for alike.
    model = ModelConfig(**(BASE | FAMILIES[family] | {"num_layers": 6}))
    layout = Layout(micro_batch=3, recompute=recompute)
    planned = memory_by_stage(model, layout, LENGTH, compute)[0].total
    assert planned == pytest.approx(peak_bytes(model, layout, torch.bfloat16, compute), rel=0.1)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon", "adafactor"])
def test_the_state_of_every_optimizer_is_planned(name) -> None:
    model, cfg = ModelConfig(**BASE), OptimizerConfig(name=name)
    with torch.device("meta"):
        parameters = dict(Transformer(model).named_parameters())
    state = make_optimizer(parameters, cfg).state.values()
    kept = sum(tensor.numel() for each in state for kind, tensor in each.items() if kind != "step")
    total = sum(parameter.numel() for parameter in parameters.values())
    assert moments_of(cfg).of(model) == pytest.approx(kept, abs=0.03 * total)
    rank = Rank(model, Layout(), Stage(0, model.num_layers, True, True), LENGTH, Compute(moments=moments_of(cfg)))
    assert rank.memory().moments == 4 * moments_of(cfg).of(model)


def test_stages_hold_all_layers_and_the_head_counts() -> None:
    model = ModelConfig(num_layers=12, hidden_size=64, num_heads=4, vocab_size=50_000)
    parts = stages(model, 4, LENGTH)
    assert sum(part.layers for part in parts) == 12
    assert parts[-1].layers == 1, "the head is worth more than the blocks"
    assert [part.first for part in parts] == [True, False, False, False]
    assert [part.last for part in parts] == [False, False, False, True]


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_hold_every_parameter(tied) -> None:
    from castalia.plan.count import count, neox_count

    model = ModelConfig(**(BASE | {"tie_embeddings": tied}))
    layout = Layout(tp=2, pp=3, dp=2, zero=1)
    masters = sum(memory.masters for memory in memory_by_stage(model, layout, LENGTH, Compute()))
    assert masters * layout.tp * layout.dp == 4 * neox_count(model, tp=2, pp=3)
    whole = memory_by_stage(model, Layout(), LENGTH, Compute())[0]
    assert (whole.masters, whole.moments) == (4 * count(model).total, 8 * count(model).total)


def test_sharding_and_recomputation_only_ever_save_memory() -> None:
    model = ModelConfig(num_layers=16, hidden_size=512, num_heads=8, vocab_size=4096)
    totals = {
        (zero, recompute): memory_by_stage(
            model, Layout(dp=8, zero=zero, accumulation=2, micro_batch=4, recompute=recompute), 1024, Compute()
        )[0].total
        for zero in (0, 1, 2, 3)
        for recompute in ("none", "selective", "full")
    }
    for zero in (0, 1, 2, 3):
        assert totals[zero, "none"] > totals[zero, "selective"] > totals[zero, "full"]
    for recompute in ("none", "selective", "full"):
        assert totals[1, recompute] > totals[2, recompute] > totals[3, recompute]


def test_impossible_cuts_are_named() -> None:
    model = ModelConfig(**BASE)
    assert problem(model, Layout(tp=2)) is None
    assert problem(model, Layout(tp=8)) == "parallel.tp=8 does not divide model.num_heads=4; use one of 1, 2, 4"
    assert "parallel.pp=4 is more than model.num_layers=3" in (problem(model, Layout(pp=4)) or "")


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        (Layout(dp=4), 1),
        (Layout(dp=4, expert=2), 2),
        (Layout(dp=4, expert=4), 4),
        (Layout(dp=4, zero=1), 4),  # ZeRO leaves each rank a quarter of all tensors, experts or not
        (Layout(dp=4, zero=1, expert=2), 4),
        (Layout(dp=4, zero=1, expert=4), 4),
        (Layout(dp=4, zero=1, dp_replicate=2, expert=4), 4),
    ],
    ids=str,
)
def test_ranks_hold_a_part_of_the_experts(layout, part) -> None:
    model = ModelConfig(**(BASE | {"experts": {"count": 8, "width": 64, "gated": True}}))
    rank = Rank(model, layout, Stage(0, 3, True, True), LENGTH, Compute())
    experts = 3 * 8 * 3 * 64 * 64
    dense = count(model).total - experts
    shards = rank.shards
    assert rank.memory().masters == 4 * (dense // shards + experts // part)
    assert rank.parameters == dense + experts // layout.expert  # what is gathered to compute with


SOME_BLOCKS = [frozenset(), frozenset({0, 1, 2}), frozenset({3, 4, 5}), frozenset({0, 3}), frozenset(range(6))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["neox", "llama", "experts", "mamba"])
def test_so_does_a_step_that_computes_some_blocks_again(family, dtype) -> None:
    model = ModelConfig(**(BASE | FAMILIES[family] | {"num_layers": 6, "vocab_size": 128}))
    compute, layout, peaks = Compute(name_of(dtype), "cpu"), Layout(micro_batch=4, recompute="auto"), []
    near = 0.1 if model.experts or model.other_kinds else 0.05
    for again in SOME_BLOCKS:
        rank = Rank(model, layout, Stage(0, 6, True, True), LENGTH, compute, again)
        peaks.append(peak_bytes(model, layout, dtype, again=again))
        assert rank.memory().total == pytest.approx(peaks[-1], rel=near), again
    none, lowest, highest, _, every = peaks
    assert every < lowest < highest < none


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", ["neox", "llama", "small vocabulary"])
def test_so_do_products_in_float8(family, recompute) -> None:
    model = ModelConfig(**(BASE | FAMILIES[family]))
    layout, compute = Layout(micro_batch=3, recompute=recompute), Compute("bf16", "cpu", float8=True)
    planned = Rank(model, layout, Stage(0, model.num_layers, True, True), LENGTH, compute).memory().total
    assert planned == pytest.approx(peak_bytes(model, layout, torch.bfloat16, compute), rel=0.05)


def test_measuring_imports_no_compiler() -> None:
    code = (
        "import sys, torch; from castalia.train.step_memory import PeakMemory\n"
        "with PeakMemory(torch.device('cpu')) as peak: torch.ones(1000)\n"
        "assert peak.bytes >= 4000 and not {'torch._dynamo', 'torch._inductor'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
