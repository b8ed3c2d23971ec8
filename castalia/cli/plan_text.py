"""A plan as text: tables with borders on a terminal, aligned columns elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from castalia.cli.render import print_table, say
from castalia.config.notes import folded
from castalia.plan.layout import Layout
from castalia.plan.plan_parts import KvCache, MemoryPlan, RunPlan, SizedPlan
from castalia.plan.recompute import again_text
from castalia.plan.run_description import describe_training
from castalia.plan.step_cost import Verdict
from castalia.plan.suggest import Suggestions, particular
from castalia.units import GiB, duration, memory_size

if TYPE_CHECKING:
    from castalia.train.start_checks import Obstacle

CATEGORIES = ("masters", "moments", "gradients", "compute_copies", "activations", "logits", "buffers")

COSTS = {  # what a step spends its time on
    "compute": "compute",
    "traffic": "memory",
    "tensor": "TP",
    "data": "DP",
    "experts": "experts",
    "bubble": "wait",
}
COLUMNS = {  # of a layout
    "tp": "tp",
    "pp": "pp",
    "dp": "dp",
    "expert": "experts over",
    "zero": "zero",
    "micro_batch": "micro-batch",
    "accumulation": "accumulate",
    "recompute": "recompute",
}


def print_report(plan: RunPlan, notes: Sequence[str], found: Sequence[Obstacle]) -> None:
    """Print the facts of a plan, its memory, what is assumed, unknown or surprising, and what `train` would refuse."""
    _facts(plan)
    if plan.sized:
        _memory(plan.layout, plan.sized.memory)
    titled = {
        "assumed": plan.assumed,
        "not known": plan.unknown,
        "note": folded(notes),
        "warning": plan.warnings,
    }
    for title, lines in titled.items():
        for line in lines:
            say(f"{title}: {line}")
    # The architecture alone is enough for a plan, so what it leaves out is one line.
    lacking = [each.text.partition(":")[0] for each in found if each.kind == "not given"]
    for finding in found:
        if finding.kind != "not given":
            say(str(finding))
    if lacking:
        say(f"not given: {', '.join(lacking)} (castalia config check says which keys)")


def print_suggestions(found: Suggestions) -> None:
    """Print the given layout, better ones below it, and what is lost by changing one setting of the best."""
    if not (found.better or found.given.fits):
        more = found.enough_gpus
        print("no layout fits on these devices" + (f"; on {more} of them some do" if more else ""))
        return
    title = "your layout and the nearest that fit"
    if found.tried:
        title = f"your layout and the fastest of {found.fitting:,} that fit ({found.tried:,} tried)"
    names = ["yours" if found.given.fits else "yours, does not fit", *map(str, range(1, len(found.better) + 1))]
    every = [found.given, *found.better]
    shared = any(verdict.layout.expert > 1 for verdict in every)
    columns = {column: title for column, title in COLUMNS.items() if shared or column != "expert"}
    rows = [[name, *_layout_row(verdict, columns)] for name, verdict in zip(names, every, strict=True)]
    header = ["", *columns.values(), "GiB", "step", "tokens/s"]
    print_table(title, header, rows)
    if others := particular(found.given.layout):
        say(f"yours has {', '.join(f'{name} {value}' for name, value in others.items())} as well; none of the others")
    if any(verdict.layout.sequence_parallel for verdict in found.better):
        print("with tp > 1 these set parallel.sequence_parallel=true")
    if not found.better:
        print("none of those that were tried is faster than yours")
    if found.losers:
        best = "the best" if found.better else "yours"
        print_table(f"{best} with one setting changed", ["change", "what happens"], [list(row) for row in found.losers])


def _layout_row(verdict: Verdict, columns: Iterable[str]) -> list[str]:
    size, step = f"{verdict.memory.total / GiB:.1f}", duration(verdict.costs.total)
    speed = f"{verdict.tokens_per_second:,.0f}"
    return [*(str(getattr(verdict.layout, name)) for name in columns), size, step, speed]


def _facts(plan: RunPlan) -> None:
    model, sized = plan.model, plan.sized
    rows = [
        ["model", f"{model.layers} layers x {model.hidden_size}, {model.heads} heads"],
        ["hidden size / layers", f"{model.hidden_per_layer:.0f}"],
    ]
    if model.padded_vocab_size:
        rows.append(["vocabulary", f"{model.vocab_size:,}, padded to {model.padded_vocab_size:,}"])
    if sized:
        rows.append(["parameters", f"{sized.total:,}"])
    rows.append(["  without embeddings", f"{plan.non_embedding:,}"])
    if sized:
        if sized.active != sized.total:
            rows.append(["  that compute a token", f"{sized.active:,}"])
        if sized.trained != sized.total:
            rows.append(["  that train", f"{sized.trained:,}"])
        rows.append(["  as GPT-NeoX counts", f"{sized.neox_total:,}"])
        kinds = sorted(sized.by_kind.items(), key=lambda item: -item[1])
        rows += [[f"  {name}", f"{size:,}"] for name, size in kinds if size * 200 >= sized.total]
        rows += _costs(sized, plan.kv_cache)
    rows += [list(row) for row in describe_training(plan.training)]
    print_table("plan", ["", ""], rows)


def _costs(sized: SizedPlan, cache: KvCache) -> Iterable[list[str]]:
    files, flops, time = sized.checkpoint, sized.flops, sized.time
    yield ["checkpoint", f"{memory_size(files['full'])} full, {memory_size(files['weights'])} weights alone"]
    yield ["  GPT-NeoX's", f"{memory_size(files['neox_full'])} full, {memory_size(files['neox_slim'])} slim"]
    yield ["operations per token", f"{flops.per_token:.4g} (GPT-NeoX's formula: {flops.neox_per_token:.4g})"]
    yield ["KV cache", f"{cache.bytes_per_token:,} bytes a token, {memory_size(cache.bytes_per_sequence)} a sequence"]
    host, drawn = sized.host_memory, sized.initial_values
    offloaded = f", and {memory_size(host.offloaded)} of parameters, gradients and moments" if host.offloaded else ""
    machine = f"at most, on a machine with {host.ranks} of the ranks" if host.ranks > 1 else "on this machine"
    yield ["host memory", f"{memory_size(host.save)} for the copies of a save{offloaded} {machine}"]
    if drawn:
        cores = f"{drawn.cores} cores for each rank" if drawn.cores > 1 else "one core"
        yield ["initial values", f"{duration(drawn.seconds)} on {cores}"]
    if time:
        yield [
            "speed",
            f"{time.tokens_per_second:,.0f} tokens/s, MFU {time.mfu:.0%} ({time.device})",
        ]
        whole = f", {duration(time.seconds)} in all" if time.seconds else ""
        yield ["time", f"{duration(time.seconds_per_step)} a step{whole}"]
        parts = {name: getattr(time.costs, name) for name in COSTS}
        costs = [f"{COSTS[name]} {duration(value)}" for name, value in parts.items() if value]
        yield ["  of a step", ", ".join(costs)]


def _memory(layout: Layout, memory: MemoryPlan) -> None:
    shape = (
        " x ".join(f"{name} {getattr(layout, name)}" for name in ("tp", "pp", "cp", "dp") if getattr(layout, name) > 1)
        or "one device"
    )
    name, unit = ("GiB", GiB) if memory.largest >= 0.1 * GiB else ("MiB", 2**20)
    title = (
        f"{name} on each rank ({shape}, zero {layout.zero}, micro-batch {layout.micro_batch} x "
        f"{layout.accumulation}, recompute {layout.recompute})"
    )
    header = ["stage", "layers", "ranks", *(name.replace("_", " ") for name in CATEGORIES), "total"]
    rows = []
    for stage in memory.stages:
        sizes = [f"{getattr(stage.memory, category) / unit:.2f}" for category in (*CATEGORIES, "total")]
        rows.append([str(stage.stage), str(stage.layers), str(stage.ranks), *sizes])
    print_table(title, header, rows)
    others = ", ".join(f"{policy} {memory_size(size)}" for policy, size in memory.by_recompute.items())
    say(f"with recompute: {others}")
    if memory.computed_again:
        texts = [again_text(counts) for counts in memory.computed_again]
        parts = [f"{text} of stage {stage}" for stage, text in enumerate(texts)] if len(texts) > 1 else texts
        say(f"computed again (recompute auto, by operations for the bytes they free): {'; '.join(parts)}")
    if memory.fits is not None and memory.usable is not None:
        verdict = "fits" if memory.fits else "does not fit"
        print(f"{verdict}: {memory_size(memory.largest)} needed, {memory_size(memory.usable)} usable on each device")
