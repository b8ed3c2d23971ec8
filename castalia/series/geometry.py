"""Which steps lie on one path through the space of weights, judged by distances between samples of them.

A step's weights are near those of the steps before and after it, measured by how far the run moves elsewhere. Weights
of another run, or of another step of this one, are far from both:

    0 ---- 1 ---- 2 ---- 3     4 ---- 5        step 4's file holds something else: from 3 to 5 it is not far,
                          \\   /                from 3 to x and from x to 5 it is
                            x
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np

FAR = 5.0  # times the usual movement, scaled to the interval
DETOUR = 10.0  # squared length over squared distance; a straight path has 1/2, a random one 1
TURNED = 0.85  # two steps are exchanged if that makes the path so much shorter
UNLIKE = 0.6  # cosine of random matrices
BACK = -0.35  # cosine between a jump and the movement since the first step: towards where the run began
BREAK = 1.5  # steps that a path may lose rather than be broken once
LOOK_BACK = 16  # steps that one may follow, past others that do not belong to the path
WINDOW = 4  # edges on each side by which the usual movement is judged


class Distances:
    """Squared distances between all steps, estimated from the samples of each tensor: [steps, places]."""

    def __init__(self, samples: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> None:
        self.names = list(samples)
        # A sample stands for all values of its tensor: scaled up, its squares sum up to about those of the whole.
        scales = [np.sqrt(counts[name] / max(1, samples[name].shape[1])) for name in self.names]
        self.parts = [samples[name].astype(np.float64) * scale for name, scale in zip(self.names, scales, strict=True)]
        # [steps, places] @ [places, steps]: kept per tensor, so that distances over any choice of them are sums.
        self.grams = {name: part @ part.T for name, part in zip(self.names, self.parts, strict=True)}

    @cached_property
    def gram(self) -> np.ndarray:
        """Products of all pairs of steps: [steps, steps]."""
        return np.sum(list(self.grams.values()), axis=0)

    def squared(self, names: Sequence[str] | None = None) -> np.ndarray:
        """Squared distances [steps, steps], over these tensors or over all."""
        gram = self.gram if names is None else np.sum([self.grams[name] for name in names], axis=0)
        sizes = np.diag(gram)
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, which rounding can make a little less than zero.
        return np.maximum(sizes[:, None] + sizes[None] - 2 * gram, 0.0)

    def cosine(self, names: Sequence[str]) -> np.ndarray:
        """Cosines [steps, steps] over these tensors."""
        gram = np.sum([self.grams[name] for name in names], axis=0)
        sizes = np.sqrt(np.maximum(np.diag(gram), 1e-300))
        return gram / sizes[:, None] / sizes[None]


def usual_movement(squared: np.ndarray, chain: Sequence[int], lengths: np.ndarray) -> Callable[[int, int], float]:
    """A function that says how far the run usually moves between two steps, by its movement on the edges around.

    `lengths` [steps]: how far each step is on the way, in updates or in summed learning rates.
    """
    edges = [(a, b) for a, b in zip(chain, chain[1:], strict=False) if lengths[b] > lengths[a]]
    far = np.array([np.sqrt(squared[a, b]) for a, b in edges])
    long = np.array([lengths[b] - lengths[a] for a, b in edges])
    middle = np.array([(lengths[a] + lengths[b]) / 2 for a, b in edges])

    def usual(a: int, b: int) -> float:
        """Scaled with the interval or with its root, whichever gives more."""
        if not edges:
            return np.inf
        at = int(np.searchsorted(middle, (lengths[a] + lengths[b]) / 2))
        near = slice(max(0, at - WINDOW), at + WINDOW)
        # A straight movement grows with the interval, a random walk with its root.
        ratio = max(lengths[b] - lengths[a], 0.0) / long[near]
        return float(np.median(far[near] * np.maximum(ratio, np.sqrt(ratio))))

    return usual


def detours(squared: np.ndarray, chain: Sequence[int]) -> dict[int, float]:
    """For each inner step of the chain: how much longer the path is over it than past it, squared."""
    return {
        i: float((squared[p, i] + squared[i, n]) / max(squared[p, n], 1e-300))
        for p, i, n in zip(chain, chain[1:], chain[2:], strict=False)
    }


def exchanged(squared: np.ndarray, chain: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours that would make the path shorter the other way round."""
    distance, pairs = np.sqrt(squared), []
    for p, a, b, n in zip(chain, chain[1:], chain[2:], chain[3:], strict=False):
        if distance[p, b] + distance[a, n] < TURNED * (distance[p, a] + distance[b, n]):
            pairs.append((a, b))
    if len(chain) > 2:  # at the ends there is a step on one side only
        a, b, n = chain[:3]
        if max(distance[a, n], distance[a, b]) < TURNED * distance[b, n]:
            pairs.append((a, b))
        p, a, b = chain[-3:]
        if max(distance[p, b], distance[a, b]) < TURNED * distance[p, a]:
            pairs.append((a, b))
    return pairs


def place_of(squared: np.ndarray, chain: Sequence[int], stranger: int) -> tuple[int, int] | None:
    """The neighbours in the chain between which a stranger fits; None if it fits nowhere."""
    best, where = np.inf, None
    for a, b in zip(chain, chain[1:], strict=False):
        if stranger not in (a, b):
            way = (squared[a, stranger] + squared[stranger, b]) / max(squared[a, b], 1e-300)
            if way < best:
                best, where = way, (a, b)
    # Twice what a random walk gives; see `DETOUR`.
    return where if best < 2.0 else None


def is_jump(
    distances: Distances, squared: np.ndarray, matrices: Sequence[str], usual: Callable[[int, int], float], start: int
) -> Callable[[int, int], bool]:
    """A function that says whether the way from one step to another looks like no movement of one run.

    It must be long, and either lead to unlike matrices or back to where the run began, from where another run came.
    """
    cosine, gram = distances.cosine(matrices) if matrices else None, distances.gram

    def jump(a: int, b: int) -> bool:
        far = np.sqrt(squared[a, b])
        if far <= FAR * usual(a, b):
            return False
        if cosine is not None and cosine[a, b] < UNLIKE:
            return True
        since = np.sqrt(squared[start, a])
        # (w_b - w_a) . (w_a - w_start)
        product = gram[a, b] - gram[b, start] - gram[a, a] + gram[a, start]
        return bool(since > 0 and product / (far * since) < BACK)

    return jump


def longest_path(chain: Sequence[int], fits: Callable[[int, int], bool]) -> tuple[list[int], list[tuple[int, int]]]:
    """The steps that follow each other, as many as possible, and the pairs among them where the path is broken.

    `fits(a, b)`: whether b may come after a. A break costs as much as `BREAK` steps.
    """
    score: dict[int, float] = {}
    before: dict[int, tuple[int | None, bool]] = {}
    for at, b in enumerate(chain):
        score[b], before[b] = 1.0, (None, False)  # a path may begin anywhere
        for a in reversed(chain[max(0, at - LOOK_BACK) : at]):
            if score[a] + 1 <= score[b]:
                continue  # even unbroken no better than what is known
            broken = not fits(a, b)
            reached = score[a] + 1 - (BREAK if broken else 0)
            # Of equally long paths the one over the nearest step stays, which was tried first.
            if reached > score[b] + 1e-9:
                score[b], before[b] = reached, (a, broken)
    if not chain:
        return [], []
    path, breaks = [max(chain, key=lambda step: score[step])], []
    while (previous := before[path[0]])[0] is not None:
        if previous[1]:
            breaks.append((previous[0], path[0]))
        path.insert(0, previous[0])  # type: ignore[arg-type]
    return path, breaks[::-1]
