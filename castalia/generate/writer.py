"""A checkpoint's model, ready to write text: in memory, split over ranks, or with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from castalia.checkpoint.restore import architecture, require_finite
from castalia.checkpoint.tensors import Checkpoint
from castalia.data.tokenizer import Tokenizer
from castalia.generate.generation import AnyModel, Prompt, Sampling
from castalia.generate.packed_model import maker, pack, packed_block
from castalia.loading import build_model, load_split, split_config
from castalia.machine import give_back_freed_memory
from castalia.parallel.rank_grid import layout
from castalia.parallel.rendezvous import world_size
from castalia.plan.stream_plan import generation_work, plan_stream
from castalia.streaming.open_streamed import budget_for, cache_share, streamed_model
from castalia.streaming.streamed_model import Packing, StreamedTransformer

if TYPE_CHECKING:
    from castalia.streaming.streamed_ranks import StreamedSplit

UNKNOWN_TOKENS = 2048  # of prompts that are not known yet, for a model without a last position


@dataclass(frozen=True)
class Numbers:
    """What a model computes with. `int8`: its weights are rounded to eight bits, from those of `dtype`."""

    dtype: torch.dtype
    device: torch.device
    int8: bool = False


def streamed_writer(
    checkpoint: Checkpoint,
    words: Tokenizer,
    prompts: Sequence[Prompt] | None,
    sampling: Sampling,
    numbers: Numbers,
    memory: int | None,
    tp: int = 1,
    pp: int = 1,
) -> StreamedTransformer | StreamedSplit | None:
    """The model with one block at a time in memory, if `memory` bytes are given or it does not fit; else None.

    `prompts`: None if they are not known yet. As many texts are written at a time as have room, at most
    `sampling.batch_size`. Raises ConfigError for too little memory, with the least that works.
    """
    world, place, int8 = world_size(), numbers.device, numbers.int8
    grid = layout(split_config(checkpoint, tp, pp, world).parallel, world)
    if memory is None and grid.dp > 1:
        return None  # which is refused where the model is loaded
    model, number = architecture(checkpoint), numbers.dtype
    bf16 = number == torch.bfloat16 and maker(number, False, 1) is not None
    packs = int8 or (bf16 and place.type == "cpu" and world == 1)
    texts = sampling.num_samples * len(prompts or [""])
    lengths = [len(prompt if not isinstance(prompt, str) else words.encode(prompt)) for prompt in prompts or ()]
    longest = max(lengths, default=model.max_positions or UNKNOWN_TOKENS)
    element_bytes = 4 if packs else number.itemsize
    wanted = min(texts, sampling.batch_size)
    work = generation_work(model, max(1, longest), sampling.max_tokens, wanted, element_bytes)
    budget = budget_for(model, work, number.itemsize, memory, place, grid)
    if budget is None:
        return None
    if packs:
        give_back_freed_memory()

    def packing(items: int) -> Packing | None:
        """The form in which CPUs write so many texts fastest."""
        product = maker(number, int8, items) if packs else None
        return product and Packing(lambda block: packed_block(block, product), lambda head: product((head, None)))

    own = replace(work, cache_each=int(work.cache_each * cache_share(model, grid)))
    return streamed_model(
        checkpoint,
        number,
        place,
        budget,
        lambda sizes, budget: plan_stream(sizes, own, budget),
        grid=grid,
        packed_item=(1 if int8 else 2) if packs else 0,
        packing=packing,
    )


def load_writer(checkpoint: Checkpoint, numbers: Numbers, rows: int, tp: int = 1, pp: int = 1) -> AnyModel:
    """The model, ready to write `rows` texts at a time; of several processes each has its share.

    Raises CheckpointError where its weights are not finite.
    """
    if world_size() > 1:
        return load_split(checkpoint, tp, pp, numbers.dtype, numbers.device)
    model = build_model(checkpoint, numbers.device, numbers.dtype)
    require_finite(dict(model.named_parameters()), checkpoint.path)
    if numbers.device.type == "cpu" and numbers.dtype != torch.float16:
        pack(model, numbers.int8, rows)
    return model
