"""Which tokens of a batch a training step computes: those that have no effect on a loss are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from castalia.model.loss import IGNORE

MOST = 0.9  # of the tokens: with a larger share to compute, choosing them takes as long as it saves


class Kept(NamedTuple):
    """The tokens of a batch [b, t] that are computed, as places in its b t tokens.

        labels of a batch    tokens that are kept
        .  .  a  b  .  .     x  x  x  x
        .  a  b  c  d  .     x  x  x  x  x

    Between the attentions of two blocks they are one row [1, m, h]. Attention needs whole sequences and gets them
    back; what stands in the gaps, after the last label, is seen by none of them. After the attention of the last block
    only tokens with a label are left, k of them.
    """

    shape: tuple[int, int]  # b, t
    tokens: Tensor  # [m]: of each sequence those up to its last label
    labelled: Tensor  # [k]: those with a label
    places: Tensor  # [k]: those with a label among the m

    def map(self, change: Callable[[Tensor], Tensor]) -> Kept:
        """The same function applied to each tensor."""
        return Kept(self.shape, change(self.tokens), change(self.labelled), change(self.places))


def kept_tokens(labels: Tensor) -> Kept | None:
    """What is kept of a batch with these labels [b, t], on the host; None where that is nearly all of it.

    The first token of a sequence without a label is kept as if it had one: a reward is read there.
    """
    real = labels != IGNORE
    real[:, 0] |= ~real.any(dim=1)
    until_last = real.flip(1).cumsum(1).flip(1) > 0
    tokens, chosen = until_last.flatten().nonzero()[:, 0], real[until_last]
    if len(tokens) > MOST * labels.numel() and chosen.sum() > MOST * len(tokens):
        return None
    places = chosen.nonzero()[:, 0]
    return Kept((labels.shape[0], labels.shape[1]), tokens, tokens[places], places)


def taken(x: Tensor, places: Tensor) -> Tensor:
    """[b, t, h] -> [1, n, h]: the tokens at n places."""
    return x.flatten(0, 1).index_select(0, places)[None]


def spread(x: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse, with zeros in all other places: [1, n, h] -> [b, t, h]."""
    rows = x.new_zeros(shape[0] * shape[1], x.shape[-1])
    return rows.index_copy(0, places, x[0]).unflatten(0, shape)
