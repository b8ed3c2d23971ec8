"""The checkpoints that are in memory: loaded when somebody asks for them, dropped by least use."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from castalia.checkpoint.restore import architecture, load_tokenizer_for, require_finite
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import ModelConfig
from castalia.data.chat import Chat
from castalia.data.tokenizer import Tokenizer
from castalia.errors import CastaliaError, ConfigError
from castalia.generate.dialogue import turn_ends
from castalia.generate.packed_model import pack
from castalia.loading import build_model
from castalia.model.transformer import Transformer
from castalia.plan.flops import kv_cache_bytes, state_bytes
from castalia.plan.serve_plan import CHUNK_TOKENS, ROWS, UNKNOWN_LENGTH, ServingPlan, serving_plan
from castalia.plan.stream_plan import PROGRAM_BYTES, SHARE, generation_work, least_budget, plan_stream
from castalia.serve.catalogue import ModelEntry, open_entry
from castalia.serve.engine import Engine, TextRow
from castalia.serve.worker import Worker
from castalia.streaming.open_streamed import free_on, open_streamed
from castalia.streaming.stream_units import units_of
from castalia.streaming.streamed_model import StreamedTransformer
from castalia.train.hardware import choose_device, choose_dtype

if TYPE_CHECKING:
    from castalia.parallel.inference import SplitModel
    from castalia.serve.followers import Ranks

ROOM_SECONDS = 60.0  # that a request waits for others to give up their checkpoints
STREAMED_WIDTHS = (1, 2, 4)  # texts at a time of a model that is read from disk in each step
STREAMED = "this checkpoint is larger than the server's memory, so that it is read from disk for every token"


class Busy(CastaliaError):
    """No room for another checkpoint while all that are loaded are in use."""


@dataclass
class LoadedModel:
    """A checkpoint in memory."""

    entry: ModelEntry
    checkpoint: Checkpoint
    model: Transformer | SplitModel
    tokenizer: Tokenizer
    plan: ServingPlan
    engine: Engine
    chat: Chat | None  # None: its tokenizer has no chat template
    turn_ends: tuple[str, ...]  # strings that end an answer
    note: str | None = None  # what the usage of each reply says


class Library:
    """The loaded checkpoints, and the thread that computes with them."""

    def __init__(self, memory: int | None = None, device: str = "auto", ranks: Ranks | None = None) -> None:
        """`memory`: bytes of this process for weights, keys and values; None: a share of what is free on the device.

        `ranks`: the processes that share each model; the library is that of the first one.
        """
        self.device, self.ranks = choose_device(device), ranks
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if ranks and self.device.type == "cpu" else 1
        self.memory = memory or int(SHARE * free_on(self.device)) // sharing
        self.loaded: dict[str, LoadedModel] = {}  # by path; the latest used comes last
        self.users: dict[str, int] = {}  # leases that are out or waited for, by path
        self.change = threading.Condition()  # of both
        self.loader = ThreadPoolExecutor(1)  # one checkpoint is loaded at a time
        self.worker = Worker(partial(ranks.tell, "wait") if ranks else None)

    @asynccontextmanager
    async def lease(self, entry: ModelEntry) -> AsyncIterator[LoadedModel]:
        """A checkpoint, loaded if it is not, which stays in memory until the block ends.

        Raises CheckpointError and DataError where it cannot be loaded, ConfigError where the memory is too small for
        it, and Busy where others that are in use take the memory for too long.
        """
        key = str(entry.path)
        with self.change:
            self.users[key] = self.users.get(key, 0) + 1
        try:
            if key not in self.loaded:
                await asyncio.wrap_future(self.loader.submit(self._load_wanted, entry))
            with self.change:
                loaded = self.loaded[key] = self.loaded.pop(key)  # the latest used one
            yield loaded
        finally:
            with self.change:
                self.users[key] -= 1
                if not self.users[key]:
                    del self.users[key]
                self.change.notify_all()

    def submit(self, loaded: LoadedModel, rows: list[TextRow]) -> None:
        """Let the texts of one request be written."""
        loaded.engine.submit(rows)
        self.worker.wake()

    async def compute(self, function: Callable[[], Any]) -> Any:
        """The result of a function that runs between two steps, in the thread that computes."""
        return await asyncio.wrap_future(self.worker.call(function))

    def close(self) -> None:
        """End the threads."""
        self.loader.shutdown(cancel_futures=True)
        self.worker.stop()
        if self.ranks and self.worker.lost is None:
            self.ranks.tell("end")

    def _load_wanted(self, entry: ModelEntry) -> None:
        """Load a checkpoint unless another request has done so, or everybody has gone."""
        key = str(entry.path)
        if key in self.loaded or key not in self.users:
            return
        loaded = self._load(entry)
        with self.change:
            self.loaded[key] = loaded
        self.worker.engines = [*self.worker.engines, loaded.engine]

    def _load(self, entry: ModelEntry) -> LoadedModel:
        checkpoint = open_entry(entry)
        cfg, tokenizer = architecture(checkpoint), load_tokenizer_for(checkpoint)
        if cfg.reward_head:
            raise ConfigError(f"{entry.name} is a reward model: it judges texts and predicts no tokens")
        cpu = self.device.type == "cpu"
        model: Transformer
        dtype = choose_dtype("fp32" if cpu else "auto", self.device)
        plan = serving_plan(cfg, dtype.itemsize, self.memory, self.ranks.layout if self.ranks else None)
        chat, ends = _chat_of(tokenizer)
        if self.ranks:
            if plan is None:
                raise ConfigError(
                    f"{entry.name} does not fit into {self.memory / 1e9:.3g} GB on each of {self.ranks.layout.gpus} "
                    "processes; give a larger --memory, or start more with --tp and --pp; without them it is read from "
                    "disk"
                )
            self._make_room(plan.total)
            # In the thread that computes, so that all ranks load between the same two steps.
            engine = self.worker.call(partial(self.ranks.load, entry, checkpoint, tokenizer, plan)).result()
            return LoadedModel(entry, checkpoint, engine.model, tokenizer, plan, engine, chat, ends)
        if plan is None:
            model, plan = self._streamed(entry, checkpoint, cfg)
            engine = Engine(model, tokenizer, plan, STREAMED_WIDTHS)
            return LoadedModel(entry, checkpoint, model, tokenizer, plan, engine, chat, ends, note=STREAMED)
        self._make_room(plan.total)
        model = build_model(checkpoint, self.device, dtype)
        require_finite(dict(model.named_parameters()), checkpoint.path)
        if cpu:
            pack(model, rows=ROWS)
        engine = Engine(model, tokenizer, plan)
        return LoadedModel(entry, checkpoint, model, tokenizer, plan, engine, chat, ends)

    def _streamed(
        self, entry: ModelEntry, checkpoint: Checkpoint, cfg: ModelConfig
    ) -> tuple[StreamedTransformer, ServingPlan]:
        """A model that does not fit, a block at a time in memory, which it takes whole. Raises ConfigError."""
        if self.device.type != "cpu":
            raise ConfigError(f"{entry.name} does not fit into {self.memory / 1e9:.3g} GB; give a larger --memory")
        length = cfg.max_positions or UNKNOWN_LENGTH
        work = generation_work(cfg, CHUNK_TOKENS, max(1, length - CHUNK_TOKENS), STREAMED_WIDTHS[-1], 4)
        units = units_of(checkpoint, cfg, torch.float32)
        try:
            plan = plan_stream(units.sizes(0), work, self.memory)
        except ConfigError as error:
            raise ConfigError(f"{entry.name}: {error}") from error
        if plan.cache_on_disk:
            least = least_budget(plan.sizes, work) + work.cache_each
            raise ConfigError(
                f"{entry.name} has no room for the keys and values of a text; give --memory {least / 1e9:.2f}GB or more"
            )
        self._make_room(self.memory - PROGRAM_BYTES)
        kv_each, kv_budget = kv_cache_bytes(cfg, 4), plan.items * work.cache_each
        serves = ServingPlan(
            self.memory - PROGRAM_BYTES - kv_budget, 0, kv_each, kv_budget, length, state_bytes(cfg, 4)
        )
        return open_streamed(checkpoint, cfg, units, plan), serves

    def _make_room(self, needed: int) -> None:
        """Drop checkpoints that nobody uses, the least used first. Raises Busy if there are too few for too long."""
        with self.change:
            if not self.change.wait_for(lambda: self._fits(needed), ROOM_SECONDS):
                names = ", ".join(loaded.entry.name for loaded in self.loaded.values())
                raise Busy(f"{names} are in use and leave no memory for another checkpoint; try again later")

    def _fits(self, needed: int) -> bool:
        idle = [key for key in self.loaded if key not in self.users]
        left = self.used - sum(self.loaded[key].plan.total for key in idle)
        if left + needed > self.memory:
            return False  # then nothing is dropped in vain
        while self.used + needed > self.memory:
            dropped = self.loaded.pop(idle.pop(0))
            # First its turns end, then the other ranks forget it: a turn after that would find nothing there.
            self.worker.engines = [engine for engine in self.worker.engines if engine is not dropped.engine]
            if self.ranks:
                self.worker.call(partial(self.ranks.drop, dropped.entry))
        return True

    @property
    def used(self) -> int:
        """Bytes of the memory that are taken."""
        return PROGRAM_BYTES + sum(loaded.plan.total for loaded in list(self.loaded.values()))


def _chat_of(tokenizer: Tokenizer) -> tuple[Chat | None, tuple[str, ...]]:
    template = tokenizer.folder.template
    if template is None:
        return None, ()
    chat = Chat(template, tuple(tokenizer.folder.special.items()))
    return chat, turn_ends(chat, tokenizer)
