"""Serving with several processes that share a model: the first one serves, and the others take the same steps after it.

rank 0       requests -> library, engines: load -> step -> step -> drop -> end
                                            |       |       |       |      |     each is announced before it is done
rank 1, ...                                load -> step -> step -> drop -> end

Logits have the same bits on all ranks, and texts follow from them, so every rank chooses the same tokens by itself and
only what has come for an engine is sent. All of it happens in the order in which rank 0's one thread computes.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from castalia.checkpoint.restore import load_tokenizer_for
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import ParallelConfig
from castalia.data.tokenizer import Tokenizer
from castalia.errors import CastaliaError, CheckpointError, out_of_memory
from castalia.loading import load_split
from castalia.parallel.inference import inference_mesh
from castalia.parallel.launcher import STOP_SIGNALS
from castalia.parallel.rank_grid import layout
from castalia.parallel.rendezvous import world_size
from castalia.plan.layout import Layout
from castalia.plan.serve_plan import ServingPlan
from castalia.serve.catalogue import ModelEntry, open_entry
from castalia.serve.engine import Engine, Request, TextRow
from castalia.train.hardware import choose_dtype


class Ranks:
    """This process among those that share the models. Made on all of them, once they are a process group."""

    def __init__(self, tp: int, pp: int, device: torch.device) -> None:
        """Raises ConfigError where so many processes do not make up one copy of a model."""
        self.tp, self.pp, self.device = tp, pp, device
        self.mesh = inference_mesh(layout(ParallelConfig(tp=tp, pp=pp), world_size()), device.type)

    @property
    def layout(self) -> Layout:
        """How a model is split."""
        return Layout(tp=self.tp, pp=self.pp)

    def tell(self, what: str, *values: Any) -> None:
        """Rank 0 tells the others what it does next."""
        content = bytearray(pickle.dumps((what, values)))
        dist.broadcast(torch.tensor([len(content)]), src=0)
        dist.broadcast(torch.from_numpy(np.frombuffer(content, np.uint8)), src=0)

    def _told(self) -> tuple[str, tuple]:
        """What rank 0 does next."""
        size = torch.empty(1, dtype=torch.int64)
        dist.broadcast(size, src=0)
        content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        return pickle.loads(content.numpy().tobytes())

    def load(self, entry: ModelEntry, checkpoint: Checkpoint, tokenizer: Tokenizer, plan: ServingPlan) -> Engine:
        """Rank 0's engine of a checkpoint that all ranks load together. Raises CheckpointError with what any meets."""
        self.tell("load", entry, plan)
        return self._loaded(lambda: (checkpoint, tokenizer), plan, partial(self._announce, entry.name))

    def drop(self, entry: ModelEntry) -> None:
        """Let the others forget a checkpoint."""
        self.tell("drop", entry.name)

    def _announce(self, name: str, requests: Sequence[Request], gone: Collection[int]) -> None:
        self.tell("step", name, [[(row.prompt, row.options) for row in request] for request in requests], gone)

    def _loaded(
        self,
        opened: Callable[[], tuple[Checkpoint, Tokenizer]],
        plan: ServingPlan,
        announce: Callable[[Sequence[Request], Collection[int]], None] | None = None,
    ) -> Engine:
        problem = None
        try:
            checkpoint, tokenizer = opened()
            dtype = choose_dtype("fp32" if self.device.type == "cpu" else "auto", self.device)
            model = load_split(checkpoint, self.tp, self.pp, dtype, self.device, self.mesh)
        except Exception as error:  # the others must not begin without this rank
            problem = str(error) if isinstance(error, CastaliaError) else out_of_memory(error)
            if problem is None:
                raise
        problems: list[str | None] = [None] * world_size()
        dist.all_gather_object(problems, problem)
        if found := [each for each in problems if each]:
            raise CheckpointError(found[0])
        return Engine(model, tokenizer, plan, announce=announce)

    def follow(self) -> None:
        """What all ranks but 0 do: take the same steps, until rank 0 ends."""
        # Rank 0 finishes what runs, and tells the others when that is done.
        before = {stop: signal.signal(stop, signal.SIG_IGN) for stop in STOP_SIGNALS}
        try:
            self._follow()
        finally:
            for stop, handler in before.items():
                signal.signal(stop, handler)

    def _follow(self) -> None:
        engines: dict[str, Engine] = {}
        while True:
            what, values = self._told()
            if what == "end":
                return
            if what == "load":
                entry, plan = values
                with suppress(CastaliaError):  # rank 0 meets it, too, and tells whoever asked
                    engines[entry.name] = self._loaded(partial(_opened, entry), plan)
            elif what == "drop":
                del engines[values[0]]
            elif what == "step":
                name, requests, gone = values
                rows = [[TextRow(prompt, options, _unheard) for prompt, options in request] for request in requests]
                try:
                    engines[name].follow(rows, gone)
                except CastaliaError:  # rank 0 meets it, too, ends its texts and goes on
                    engines[name].fail("")


def _opened(entry: ModelEntry) -> tuple[Checkpoint, Tokenizer]:
    checkpoint = open_entry(entry)
    return checkpoint, load_tokenizer_for(checkpoint)


def _unheard(event: Any) -> None:
    """Nobody reads the texts of these ranks."""
