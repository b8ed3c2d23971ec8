"""Everything that depends on the position of a token: rotary and sinusoidal tables, ALiBi slopes, attention masks.

Shapes: rows is b, or 1 where all sequences are alike; t queries, k keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from castalia.config.schema import ModelConfig, RopeScaling
from castalia.errors import ConfigError

# Cosines and sines, each [rows, t, 1, 1, rotary_size / 2]. With a single position per row, as in decoding, launching a
# kernel costs more than its work, so the rotation is one matrix [rows, rotary_size, rotary_size] instead.
Rotation = tuple[Tensor, Tensor] | Tensor


class Rotary:
    """Tables of cosines and sines, computed in fp32 once for each device, and again for longer sequences.

    It is not a module: the tables are derived values, never part of a checkpoint, and a model on the meta device
    has none. Rotary position embedding: Su et al., 2104.09864.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        self.frequencies, self.magnitude = rotary_frequencies(cfg)
        self.tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.single: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}  # what `_matrices` needs

    def __call__(self, positions: Tensor, end: int, dtype: torch.dtype) -> Rotation:
        """The rotation of each of `positions` [rows, t], which are all below `end`, for `rotate`."""
        if positions.shape[1] == 1:
            return self._matrices(positions, end, dtype)
        cos, sin = (part[positions][:, :, None, None].to(dtype) for part in self._table(positions.device, end))
        return cos, sin  # [rows, t, 1, 1, size / 2]

    def _table(self, device: torch.device, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of at least `end` positions: [length, size / 2]."""
        table = self.tables.get(device)
        if table is None or len(table[0]) < end:
            length = 1 << (max(end, 256) - 1).bit_length()  # a power of two: decoding rarely meets a longer one
            angles = torch.outer(torch.arange(length).float(), self.frequencies).to(device)
            table = angles.cos() * self.magnitude, angles.sin() * self.magnitude
            self.tables[device] = table
        return table

    def _matrices(self, positions: Tensor, end: int, dtype: torch.dtype) -> Tensor:
        """The rotation at `positions` [rows, 1] as matrices by which rows are multiplied from the right: [rows, r, r].

        They take the r dimensions that turn. Row i has the cosine of its pair at i, and its sine at the other of the
        pair, with a minus if i is the second.
        """
        device = positions.device
        if device not in self.single or len(self.single[device][0]) < end:
            cos, sin = self._table(device, end)
            own = torch.eye(2 * cos.shape[1], device=device)
            first, second = own.chunk(2)
            self.single[device] = torch.cat((cos, cos, sin, sin), dim=1), own, torch.cat((second, -first))
        turns, own, other = self.single[device]
        cos, sin = turns[positions].view(len(positions), 2, -1, 1).unbind(1)  # [rows, r, 1]
        return (cos * own + sin * other).to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first 2 * half dimensions of every head, i paired with i + half. x: [b, t, kv, heads, d]."""
    if isinstance(rotation, Tensor):
        size = rotation.shape[-1]
        turning = x[..., :size].flatten(1, 3)  # [b, kv * heads, r], since t is 1
        turned = (turning @ rotation).view(*x.shape[:-1], size)  # by [b or 1, r, r]
        return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)
    cos, sin = rotation
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]), dim=-1)


def rotate_in_place(x: Tensor, rotation: Rotation) -> None:
    """`rotate` of a tensor that is not needed any more; dimensions that do not turn stay where they are."""
    if isinstance(rotation, Tensor):
        turning = x.flatten(1, 3).narrow(-1, 0, rotation.shape[-1])  # [b, kv * heads, r], since t is 1
        turning.copy_(turning @ rotation)
    else:
        turning = x.narrow(-1, 0, 2 * rotation[0].shape[-1])
        # Products of numbers of two dtypes take several times as long.
        turning.copy_(rotate(turning.to(rotation[0].dtype), rotation))


def rotary_frequencies(cfg: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position of each rotating pair, fp32 [rotary_size / 2], and the factor on cosines and sines.

    Raises ConfigError if the scaling needs the length of the original training and the config does not give it.
    """
    size = cfg.rotary_size
    exponents = torch.arange(0, size, 2, device="cpu").float() / size  # a real device even in a meta-device context
    frequencies = 1.0 / cfg.rotary_base**exponents
    scaling = cfg.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    original = scaling.original_positions or cfg.max_positions
    if original is None:
        raise ConfigError(
            f"model.rope_scaling.kind={scaling.kind} needs the length of the original training; "
            "give model.rope_scaling.original_positions"
        )
    if scaling.kind == "llama3":
        return _llama3_frequencies(frequencies, scaling, original), 1.0
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return _yarn_frequencies(frequencies, scaling, original, cfg.rotary_base), attention_factor


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling, original: int) -> Tensor:
    """Divide the frequencies of slow pairs by the factor, keep those of fast ones, and blend in between.

    What counts as slow or fast is the number of turns within the length of the original training (Llama 3.1).
    """
    turns = original * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def _yarn_frequencies(frequencies: Tensor, scaling: RopeScaling, original: int, base: float) -> Tensor:
    """As for Llama 3, but blended linearly over the index of the pair, between whole indices (YaRN, 2309.00071)."""
    size = 2 * len(frequencies)

    def index_of(turns: float) -> float:
        """The index of the pair, as a real number, that makes this many turns within the original length."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(index_of(scaling.beta_fast)), 0)
    last = min(math.ceil(index_of(scaling.beta_slow)), size - 1)
    pairs = torch.arange(len(frequencies), device="cpu").float()
    stretch = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - stretch) + frequencies / scaling.factor * stretch


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """Sinusoidal embeddings of positions [rows, t] -> fp32 [rows, t, size]: all sines, then all cosines."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, device=positions.device).float() / size)
    angles = positions[..., None].float() * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Alibi:
    """A bias on scores that falls with the distance of query and key, by a slope per head (Press et al., 2108.12409).

    A tensor rank keeps the slopes of its heads: see `shard`.
    """

    def __init__(self, num_heads: int) -> None:
        self.slopes = alibi_slopes(num_heads)
        self.tables: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The slopes on a device, fp32 [heads, 1, 1]. Copied once, as a copy from the host waits for the device."""
        if device not in self.tables:
            self.tables[device] = torch.tensor(self.slopes, device=device)[:, None, None]
        return self.tables[device]

    def shard(self, rank: int, size: int) -> None:
        """Keep the slopes of this one of `size` tensor ranks."""
        heads = len(self.slopes) // size
        self.slopes = self.slopes[rank * heads :][:heads]


def alibi_slopes(num_heads: int) -> list[float]:
    """The geometric slopes of ALiBi. If the number of heads is not a power of two, every second member of the next
    finer series follows.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]


def positions_in_documents(documents: Tensor) -> Tensor:
    """Positions that count from 0 in each run of equal document numbers. [b, t] -> [b, t]."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees: none after it, and none more than `window` tokens before it.

    Places in the sequence [rows, t], [rows, k] -> bool [rows, 1, t, k].
    """
    distance = queries[:, None, :, None] - keys[:, None, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance <= window)


def score_bias(queries: Tensor, keys: Tensor, seen: Tensor, alibi: Alibi | None, dtype: torch.dtype) -> Tensor:
    """The bias that is added to the scores: -inf for keys that a query does not see, else ALiBi's bias, or zero.

    Places in the sequence [rows, t], [rows, k], `seen` bool [rows, 1, t, k] -> [rows, 1 or heads, t, k].
    """
    rows, _, t, k = seen.shape
    bias = aligned_rows(seen, (rows, 1 if alibi is None else len(alibi.slopes), t, k), dtype)
    if alibi is None:
        bias.zero_()
    else:
        distance = (keys[:, None, None, :] - queries[:, None, :, None]).float()
        torch.mul(alibi.on(seen.device), distance.expand(rows, -1, -1, -1), out=bias)
    return bias.masked_fill_(~seen, -torch.inf)


def aligned_rows(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor on the device of `like`, whose rows begin at multiples of 16 bytes if that is a GPU.

    The memory-efficient kernel needs a bias that is aligned so. Torch would pad any other one anew in every layer.
    """
    *rest, width = shape
    room = -width % 8 if like.is_cuda else 0
    return torch.empty((*rest, width + room), dtype=dtype, device=like.device)[..., :width]
