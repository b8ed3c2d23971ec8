"""Token sequences as a tree of common prefixes, so that a model computes each shared token once.

    the cat sat      the --+-- cat --+-- sat        segments: "the", "cat", "sat", "ran", "dog barked"
    the cat ran            |         +-- ran        leaves that share a parent go through attention together
    the dog barked         +-- dog barked

Sequences are sorted, so that the tree is walked branch by branch. The keys and values of the branch that is being
walked stay in a buffer, where a token lies at its own place in its sequence. Every segment overwrites what earlier
branches left behind its parent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castalia.errors import ConfigError
from castalia.model.attention import Recurrent, attend
from castalia.model.positions import score_bias, visible
from castalia.model.transformer import Transformer
from castalia.streaming.scratch_file import zeros_on_disk

LEAVES_ALWAYS_TOGETHER = 64  # tokens; more leaves go together as long as they are shorter than what they share


@dataclass
class Segment:
    """Tokens between two branchings: those at places `start` to `stop` of the sequences `first` to `end`."""

    first: int
    end: int
    start: int
    stop: int
    leaves: list[Segment] = field(default_factory=list)
    branches: list[Segment] = field(default_factory=list)


class Piece(NamedTuple):
    """Segments that go through attention together: one, or several leaves of one parent. They begin at one place."""

    start: int
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """The number of its tokens."""
        return sum(segment.stop - segment.start for segment in self.segments)


def build_tree(sequences: Sequence[Sequence[int]]) -> Segment:
    """The root, an empty segment, of the tree of sorted, distinct, non-empty sequences."""
    common = [_common_length(a, b) for a, b in zip(sequences, sequences[1:], strict=False)]  # of neighbours
    root = Segment(0, len(sequences), 0, 0)
    childless = [root]  # a list, no recursion: the tree may be as deep as its sequences are long
    while childless:
        parent = childless.pop()
        first = parent.first
        if first < parent.end and len(sequences[first]) == parent.stop:  # a sequence that ends with the parent itself
            first += 1
        while first < parent.end:
            end = first + 1
            # Sorted, all sequences that share the next token lie side by side.
            while end < parent.end and common[end - 1] > parent.stop:
                end += 1
            if end == first + 1:
                parent.leaves.append(Segment(first, end, parent.stop, len(sequences[first])))
            else:
                # All of a sorted group share what its least similar neighbours share.
                parent.branches.append(Segment(first, end, parent.stop, min(common[first : end - 1])))
                childless.append(parent.branches[-1])
            first = end
    return root


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def pieces(root: Segment) -> Iterator[Piece]:
    """The tree in the order in which it is computed: parents before children, one branch after the other."""
    waiting = [root]
    while waiting:
        segment = waiting.pop()
        if segment.stop > segment.start:
            yield Piece(segment.start, (segment,))
        yield from _leaves_together(segment)
        waiting += reversed(segment.branches)  # the last one is taken first


def _leaves_together(parent: Segment) -> Iterator[Piece]:
    limit, size = max(LEAVES_ALWAYS_TOGETHER, parent.stop), 0
    group: list[Segment] = []
    for leaf in parent.leaves:
        length = leaf.stop - leaf.start
        if group and size + length > limit:
            yield Piece(parent.stop, tuple(group))
            group, size = [], 0
        group.append(leaf)
        size += length
    if group:
        yield Piece(parent.stop, tuple(group))


class BranchCache:
    """A `castalia.model.attention.Cache`: the keys and values of the branch that is being walked, in every layer.

    Several pieces go through the model back to back, as one sequence [1, t]; `of` gives the cache as they see it.
    """

    gaps, grows = False, True

    def __init__(self, stage: Transformer, device: torch.device, on_disk: bool = False) -> None:
        """`stage`: the model, or this rank's part of it. `on_disk`: see `KVCache`."""
        self.stage, self.device, self.on_disk = stage, device, on_disk
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [1, kv, capacity, d]
        # Of layers without attention, by the number of tokens up to the end of a segment of the branch: [1, ...].
        self.states: dict[int, dict[int, list[Tensor]]] = {}
        self.pieces: list[Piece] = []
        self.biases: dict[int | None, list[Tensor | None]] = {}  # by window: of each piece, the same in all layers
        self.keys = torch.empty(0, device=device)
        self.end = 0

    def of(self, part: Sequence[Piece]) -> BranchCache:
        """The same keys and values for the pieces of a forward pass. Each layer takes passes in their order."""
        own = copy(self)
        own.pieces, own.biases = list(part), {}
        places = [torch.arange(s.start, s.stop) for piece in part for s in piece.segments]
        own.keys = torch.cat(places)[None].to(self.device)
        own.end = max(segment.stop for piece in part for segment in piece.segments)
        return own

    def reserve(self, count: int) -> Tensor:
        """The places of all tokens of the pass: [1, t]."""
        return self.keys

    def advance(self, count: int) -> None:
        """Nothing to note: the places of the next tokens follow from their pieces."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention of each piece to its ancestors and itself: q [1, n, t, d] -> the same shape."""
        keys, values = self._buffers(layer, k)
        # The bias that comes is of the pass as one sequence; each piece needs its own.
        choice, _ = options.pop("choice"), options.pop("bias")
        masked = self.stage.choice(q, "bias", self)
        window = self.stage.cfg.window_of(layer)
        if window not in self.biases:
            self.biases[window] = [self._bias(piece, q, window) for piece in self.pieces]
        outputs, at = [], 0
        for piece, bias in zip(self.pieces, self.biases[window], strict=True):
            part, here = slice(at, at + piece.size), slice(piece.start, piece.start + piece.size)
            # [1, kv, tokens of the piece, d]. Leaves that go together lie back to back behind their parent, and
            # not at their own places: they have no children that would look for them there.
            keys[:, :, here], values[:, :, here] = k[:, :, part], v[:, :, part]
            seen = slice(0, here.stop)
            outputs.append(
                attend(
                    q[:, :, part],
                    keys[:, :, seen],
                    values[:, :, seen],
                    choice=choice if bias is None else masked,
                    bias=bias,
                    **options,
                )
            )
            at = part.stop
        return torch.cat(outputs, dim=2)

    def recur(self, layer: int, module: Recurrent, x: Tensor) -> Tensor:
        """Each segment after its parent, whose state its layer has kept: x [1, t, h] -> the same shape."""
        if self.on_disk:
            raise ConfigError(
                "there is no room for what is kept of each text, and blocks without attention cannot keep it on disk; "
                "give a larger --memory"
            )
        states, outputs, at = self.states.setdefault(layer, {}), [], 0
        for piece in self.pieces:
            for stop in [stop for stop in states if stop > piece.start]:  # of branches that are behind us
                del states[stop]
            for segment in piece.segments:
                size = segment.stop - segment.start
                if segment.start:
                    state = [part.clone() for part in states[segment.start]]
                else:
                    state = module.new_state(1, self.stage.cfg.max_positions or segment.stop, x)
                outputs.append(module.advance(x[:, at : at + size], state))
                at += size
            if len(piece.segments) == 1:  # several together are leaves, which nothing follows
                states[piece.segments[0].stop] = state
        return torch.cat(outputs, dim=1)

    def _bias(self, piece: Piece, q: Tensor, window: int | None) -> Tensor | None:
        """What hides keys of other leaves and later keys, [1, 1 or n, t, k]; None where causal attention does it."""
        plain = self.stage.alibi is None and (window is None or piece.size <= window + 1)
        if piece.start == 0 and len(piece.segments) == 1 and plain:
            return None
        own = torch.cat([torch.arange(s.start, s.stop, device=self.device) for s in piece.segments])  # [t]
        places = torch.cat([torch.arange(piece.start, device=self.device), own])[None]  # [1, k]
        seen = visible(own[None], places, window)  # [1, 1, t, k]
        if len(piece.segments) > 1:
            leaf = torch.arange(len(piece.segments), device=self.device)
            lengths = torch.tensor([s.stop - s.start for s in piece.segments], device=self.device)
            leaf = leaf.repeat_interleave(lengths)
            seen[..., piece.start :] &= leaf[:, None] == leaf  # [t, t]: of the leaves each sees itself alone
        return score_bias(own[None], places, seen, self.stage.alibi, q.dtype)

    def _buffers(self, layer: int, k: Tensor) -> tuple[Tensor, Tensor]:
        needed = max(piece.start + piece.size for piece in self.pieces)
        old = self.layers.get(layer)
        if old is None or old[0].shape[2] < needed:
            room = max(needed, 2 * old[0].shape[2] if old else 0)  # doubled, so that it is seldom copied
            shape = 1, k.shape[1], room, k.shape[3]
            new = tuple(zeros_on_disk(shape, k.dtype) if self.on_disk else k.new_zeros(shape) for _ in range(2))
            for there, here in zip(new, old or (), strict=False):
                there[:, :, : here.shape[2]] = here
            self.layers[layer] = new[0], new[1]
        return self.layers[layer]
