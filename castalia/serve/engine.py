"""Continuous batching: texts join and leave the batch of a model at any step.

submit -> waiting, by request -> filling: a chunk of each prompt in turn -> writing: one token for all in each step
             |                        |                                         |
       a slot and room for      chunks that others have              log-probabilities, choice of a token,
       keys and values          computed are copied                  text -> Drawn, to whoever asked

Several prompts are read between two steps, so that texts which come together are written together: a step takes nearly
as long with few texts as with many. Those whose prompt has just been read share the product with the head.

A text is the same bits whatever else runs: prompts are cut at the same places and each chunk runs by itself, attention
and experts run row by row, and batches have only widths in which the other kernels give a row the same bits
(`exact_widths`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from castalia.data.tokenizer import Tokenizer
from castalia.errors import CastaliaError
from castalia.generate.generation import GenerationRow, checked_logits
from castalia.generate.kv_cache import KVCache
from castalia.generate.sampling import Noise, choose
from castalia.generate.text_stream import TextStream
from castalia.machine import close_gaps
from castalia.model.experts import ExpertMLP
from castalia.model.transformer import Transformer
from castalia.plan.serve_plan import CHUNK_TOKENS, ROWS, STEP_TOKENS, ServingPlan
from castalia.serve.slot_batch import SlotBatch, exact_widths

if TYPE_CHECKING:
    from castalia.parallel.inference import SplitModel

GAP_ROUNDS = 200  # texts and prefixes of all lengths come and go, and would else take nearly twice their size
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, ROWS)


class TokenScore(NamedTuple):
    """The log-probability of a token in nats, its rank from 1, and the likeliest tokens with theirs."""

    token: int
    log_prob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class Drawn(NamedTuple):
    """A token that was written, with the text that can be shown now. The last one of a text says why it ends."""

    token: int | None  # None: the text ends without a token
    text: str
    score: TokenScore | None
    finish_reason: str | None


class PromptScores(NamedTuple):
    """The scores of some of a prompt's tokens, in their order; the first token of all has none."""

    scores: list[TokenScore]


class Failed(NamedTuple):
    """A text that cannot be written, and why."""

    message: str


Event = Drawn | PromptScores | Failed
Request = Sequence["TextRow"]  # the texts of one request


class PromptChunk(NamedTuple):
    """What a chunk of a prompt leaves for the tokens after it, by the number of the layer."""

    layers: Mapping[int, tuple[Tensor, Tensor]]  # keys and values of its tokens [1, kv, t, d]
    states: Mapping[int, list[Tensor]]  # at its end [1, ...]
    hidden: Tensor  # final hidden states [t, h]


@dataclass(frozen=True)
class TextOptions:
    """How a text is written. Scores are the model's own, before temperature, bias and penalties."""

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0
    number: int = 0  # of several texts of one prompt and seed
    stop: tuple[str, ...] = ()
    bias: Mapping[int, float] = field(default_factory=dict)  # by token
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top: int | None = None  # how many likely tokens are told of each new token; None: no scores
    prompt_top: int | None = None  # the same of the prompt's


class TextRow:
    """A text that is waited for, and what it has come to."""

    def __init__(self, prompt: Sequence[int], options: TextOptions, tell: Callable[[Event], None]) -> None:
        """`tell` is called in the engine's thread."""
        self.prompt, self.options, self.tell = list(prompt), options, tell
        self.cancelled = False  # set by whoever asked, from any thread
        self.number = 0  # among the texts of its engine, in the order in which they came
        self.cache: KVCache | None = None
        self.text: GenerationRow | None = None
        self.noise: Noise | None = None
        self.counts: dict[int, int] = {}  # of each token in the text
        self.token = 0  # the last one, which the model has not seen

    @property
    def capacity(self) -> int:
        """Tokens that the model sees: the last one is never read."""
        return len(self.prompt) + max(0, self.options.max_tokens - 1)


class Prefixes:
    """Chunks of prompts that were computed, by all tokens up to their end; the least used ones are dropped."""

    def __init__(self, budget: int, kv_each: int, state_each: int) -> None:
        """Bytes in all, those of a token's keys and values, and those of a text's states."""
        self.budget, self.kv_each, self.state_each, self.bytes = budget, kv_each, state_each, 0
        self.chunks: OrderedDict[bytes, PromptChunk] = OrderedDict()

    def find(self, key: bytes) -> PromptChunk | None:
        """The chunk that ends these tokens, if it was kept."""
        if key in self.chunks:
            self.chunks.move_to_end(key)
        return self.chunks.get(key)

    def add(self, key: bytes, chunk: PromptChunk) -> None:
        """Keep a chunk if there is room for it at all."""
        size = self._bytes(chunk)
        if size > self.budget:
            return
        self.chunks[key] = chunk
        self.bytes += size
        while self.bytes > self.budget:
            self.bytes -= self._bytes(self.chunks.popitem(last=False)[1])

    def _bytes(self, chunk: PromptChunk) -> int:
        """As planned, which is the same for all processes of a split model."""
        return len(chunk.hidden) * self.kv_each + self.state_each + chunk.hidden.nbytes


class Engine:
    """The texts of one model. All methods but `submit` are called by one thread.

    Everything follows from what came before which step, so that engines of several processes that are told the same
    do the same, each with its share of the model.
    """

    def __init__(
        self,
        model: Transformer | SplitModel,
        tokenizer: Tokenizer,
        plan: ServingPlan,
        widths: Sequence[int] = WIDTHS,
        announce: Callable[[Sequence[Request], Collection[int]], None] | None = None,
    ) -> None:
        """`widths`: texts in a batch, of which those count that give a text the same bits.

        `announce` is told before each step what has come: requests, and numbers of texts that nobody waits for.
        """
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.vocab_size = min(model.cfg.vocab_size or tokenizer.vocab_size, tokenizer.vocab_size)  # no padding
        self.announce, self.number, self.rounds = announce, 0, 0  # the next text's number
        self.inbox: deque[Request] = deque()
        self.waiting: deque[deque[TextRow]] = deque()  # of each request
        self.filling: deque[TextRow] = deque()
        self.writing: list[TextRow] = []
        # A state of gMLP is as large as its text may become, so that it does not fit another one.
        shares = not {"gmlp", "amlp"}.intersection(model.cfg.other_kinds)
        self.prefixes = Prefixes(plan.prefix_budget if shares else 0, plan.kv_each, plan.state_each)
        self.counters = {"prompt_tokens": 0, "prefix_tokens": 0, "generated_tokens": 0, "steps": 0}
        for module in model.modules():
            if isinstance(module, ExpertMLP):
                module.apart = True
        with torch.inference_mode():
            self.widths = exact_widths(model, widths)

    def submit(self, rows: Sequence[TextRow]) -> None:
        """Take the texts of one request in, from any thread."""
        self.inbox.append(rows)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.inbox or self.waiting or self.filling or self.writing)

    @property
    def kv_bytes(self) -> int:
        """Bytes that are reserved for the texts in work."""
        return sum(self._bytes(row) for row in (*self.filling, *self.writing))

    def _bytes(self, row: TextRow) -> int:
        return row.capacity * self.plan.kv_each + self.plan.state_each

    def step(self) -> None:
        """Take in what has come, and go on with it."""
        requests = [self.inbox.popleft() for _ in range(len(self.inbox))]
        self._number(requests)
        gone = {row.number for row in (*self.filling, *self.writing) if row.cancelled}
        for request in (*self.waiting, *requests):
            gone.update(row.number for row in takewhile(lambda row: row.cancelled, request))
        if self.announce is not None:
            self.announce(requests, gone)
        self._go_on(requests, gone)

    def follow(self, requests: Sequence[Request], gone: Collection[int]) -> None:
        """The step that another process has announced."""
        self._number(requests)
        self._go_on(requests, gone)

    def _number(self, requests: Sequence[Request]) -> None:
        for request in requests:
            for row in request:
                row.number, self.number = self.number, self.number + 1

    @torch.inference_mode()
    def _go_on(self, requests: Sequence[Request], gone: Collection[int]) -> None:
        """A chunk each of some prompts, and a token for every text whose prompt has been read."""
        self.waiting.extend(map(deque, requests))
        if gone:
            self._drop(gone)
        self._admit()
        beginning = self._fill()
        if self.writing or beginning:
            self._write(beginning)
        self.rounds += 1
        if self.rounds % GAP_ROUNDS == 0:
            close_gaps()

    def fail(self, message: str) -> None:
        """End all texts with this message."""
        rows = [row for request in (*self.inbox, *self.waiting) for row in request]
        for row in (*rows, *self.filling, *self.writing):
            row.cache = None
            row.tell(Failed(message))
        for queue in (self.inbox, self.waiting, self.filling, self.writing):
            queue.clear()

    def _drop(self, gone: Collection[int]) -> None:
        for row in (*self.filling, *self.writing):
            if row.number in gone:
                row.cache = None
        self.writing = [row for row in self.writing if row.cache is not None]
        if any(row.cache is None for row in self.filling):
            self.filling = deque(row for row in self.filling if row.cache is not None)
        for request in self.waiting:
            while request and request[0].number in gone:
                request.popleft()
        if any(not request for request in self.waiting):
            self.waiting = deque(request for request in self.waiting if request)

    def _admit(self) -> None:
        """Give free slots to the requests in turn, a text each. The next one waits for its room; none overtakes it."""
        while self.waiting and len(self.filling) + len(self.writing) < self.widths[-1]:
            request = self.waiting[0]
            row = request[0]
            if self.kv_bytes + self._bytes(row) > self.plan.row_budget:
                return
            row.cache = KVCache(1, row.capacity, self.model.device, self.model.cache_dtype)
            words = TextStream(self.tokenizer, row.prompt, row.options.stop)
            row.text = GenerationRow(row.options.number, list(row.prompt), words)
            if row.options.temperature:
                row.noise = Noise(row.options.seed, [row.options.number], self.model.device)
            self.filling.append(row)
            request.popleft()
            self.waiting.rotate(-1)
            if not request:
                self.waiting.pop()

    def _fill(self) -> list[tuple[TextRow, Tensor]]:
        """The next chunk of some prompts in turn, and the texts that begin, with the last hidden state [1, h] of each.

        These stay in the queue until they have their first token, so that `fail` ends them where something goes wrong.
        """
        beginning, computed = [], 0
        for _ in range(len(self.filling)):
            if computed >= STEP_TOKENS:
                break
            row = self.filling[0]
            cache = row.cache
            assert cache is not None
            start = cache.length
            hidden, copied = self._chunk(row, cache)
            computed += 0 if copied else len(hidden)
            try:
                if row.options.prompt_top is not None:
                    row.tell(PromptScores(self._prompt_scores(row, hidden, start)))
                if cache.length == len(row.prompt):
                    if row.options.max_tokens:
                        beginning.append((row, hidden[-1:]))
                    else:
                        row.tell(Drawn(None, "", None, "length"))
                        row.cache = None
            except CastaliaError as error:
                row.tell(Failed(str(error)))
                row.cache = None
            self.filling.rotate(-1)
        self.filling = deque(row for row in self.filling if row.cache is not None)
        return beginning

    def _chunk(self, row: TextRow, cache: KVCache) -> tuple[Tensor, bool]:
        """The final hidden states [t, h] of a prompt's next chunk, and whether another text had computed it."""
        start = cache.length
        stop = min(start + CHUNK_TOKENS, len(row.prompt))
        keeps, key = self.prefixes.budget > 0, b""
        if keeps:
            key = blake2b(np.asarray(row.prompt[:stop], np.int64).tobytes(), digest_size=32).digest()
        known = self.prefixes.find(key)
        if known is None:
            tokens = torch.tensor([row.prompt[start:stop]], device=self.model.device)
            hidden = self.model.hidden(tokens, cache=cache)[0]
            if keeps:
                own = cache.layers.items()  # of a split model those of this process, by their numbers
                layers = {layer: (k[:, :, start:stop].clone(), v[:, :, start:stop].clone()) for layer, (k, v) in own}
                self.prefixes.add(key, PromptChunk(layers, _copied(cache.states), hidden))
        else:
            hidden = known.hidden
            for layer, (k, v) in known.layers.items():
                keys, values = cache.layer(layer, k)
                keys[:, :, start:stop], values[:, :, start:stop] = k, v
            cache.states = _copied(known.states)
            cache.reserve(stop - start)
            cache.advance(stop - start)
            self.counters["prefix_tokens"] += stop - start
        self.counters["prompt_tokens"] += stop - start
        return hidden, known is not None

    def _prompt_scores(self, row: TextRow, hidden: Tensor, start: int) -> list[TokenScore]:
        """The scores of the tokens after those of a chunk, of which the prompt has none after its last."""
        targets = row.prompt[start + 1 : start + 1 + len(hidden)]
        logits = checked_logits(self.model, self.model.logits(hidden[: len(targets)]))
        return self._scores(logits, targets, row.options.prompt_top or 0)

    def _scores(self, logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
        """Of one token for each row of logits [rows, V]."""
        if not tokens:
            return []
        log_probs = logits.float().log_softmax(dim=-1)
        own = log_probs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])  # [rows, 1]
        known = log_probs[:, : self.vocab_size]  # rows that fill up are no tokens
        ranks = (known > own).sum(dim=1) + 1
        values, ids = known.topk(min(top, self.vocab_size))
        parts = (own[:, 0].tolist(), ranks.tolist(), values.tolist(), ids.tolist())
        return [
            TokenScore(token, value, rank, tuple(zip(likely, scores, strict=True)))
            for token, value, rank, scores, likely in zip(tokens, *parts, strict=True)
        ]

    def _write(self, beginning: Sequence[tuple[TextRow, Tensor]]) -> None:
        """A token for the texts that are being written, and the first one of those that begin."""
        rows = [*self.writing, *(row for row, _ in beginning)]
        parts = [self._stepped(self.writing)] if self.writing else []
        parts += [hidden for _, hidden in beginning]
        if padding := self._width(len(rows)) - len(rows):
            parts.append(parts[0].new_zeros(padding, parts[0].shape[1]))
        logits = self.model.logits(torch.cat(parts))  # [width, V]
        going = []
        for number, row in enumerate(rows):
            try:
                if self._take(row, logits[number : number + 1]):
                    going.append(row)
                    continue
            except CastaliaError as error:
                row.tell(Failed(str(error)))
            row.cache = None  # the request may hold the row until its other texts are done
        # Only now, so that `fail` ends all of them where something else goes wrong.
        self.writing = going
        begun = {id(row) for row, _ in beginning}
        self.filling = deque(row for row in self.filling if id(row) not in begun)

    def _stepped(self, rows: Sequence[TextRow]) -> Tensor:
        """The final hidden states [rows, h] after the last token of each text."""
        width = self._width(len(rows))
        tokens = [row.token for row in rows] + [0] * (width - len(rows))
        batch = SlotBatch(self.model, [row.cache for row in rows if row.cache], width)
        hidden = self.model.hidden(torch.tensor(tokens, device=self.model.device)[:, None], cache=batch)
        self.counters["steps"] += 1
        return hidden[: len(rows), 0]

    def _width(self, count: int) -> int:
        """The rows of a batch for so many texts."""
        return next(width for width in self.widths if width >= count)

    def _take(self, row: TextRow, logits: Tensor) -> bool:
        """Choose the next token of a text from logits [1, V], and tell it. Whether the text goes on."""
        options, text = row.options, row.text
        assert text is not None
        logits = checked_logits(self.model, logits)
        allowed = logits[:, : self.vocab_size]
        changed = self._changed(row, allowed)
        token = int(choose(changed, row.noise, options.temperature, options.top_k, options.top_p))
        score = None if options.top is None else self._scores(logits, [token], options.top)[0]
        piece = text.take(token, self.tokenizer.end_ids, options.max_tokens)
        row.token = token
        row.counts[token] = row.counts.get(token, 0) + 1
        self.counters["generated_tokens"] += 1
        row.tell(Drawn(token, piece.text, score, piece.finish_reason))
        return not piece.last

    def _changed(self, row: TextRow, logits: Tensor) -> Tensor:
        """Logits [1, V] with the bias and the penalties that were asked for."""
        options = row.options
        changes = dict(options.bias)
        if options.presence_penalty or options.frequency_penalty:
            for token, number in row.counts.items():
                penalty = options.presence_penalty + number * options.frequency_penalty
                changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return logits
        logits = logits.float().clone()
        logits[0, torch.tensor(list(changes), device=logits.device)] += torch.tensor(
            list(changes.values()), dtype=torch.float32, device=logits.device
        )
        return logits


def _copied(states: Mapping[int, list[Tensor]]) -> dict[int, list[Tensor]]:
    return {layer: [part.clone() for part in state] for layer, state in states.items()}
