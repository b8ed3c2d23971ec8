"""What is read from disk together: a block, or the head; and how it lies in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from castalia.checkpoint.restore import fitting_tensors
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import block_of, row_of
from castalia.model.layers import held_dtype
from castalia.plan.layout import Stage, stages
from castalia.plan.stream_plan import BUFFERS, PIECE_BYTES, READERS, TOKEN_MATRICES, StreamedSizes
from castalia.storage.derived import Joined, Part, Permuted, Reordered, Transposed, Wrapper, part
from castalia.storage.direct import WINDOW_BYTES
from castalia.storage.lazy import ITEM_BYTES, TensorRef, everything

PLACE = 64  # bytes, at a multiple of which each tensor begins, as torch's own do: kernels may depend on it
PACKING_COPIES = 12  # bytes per value of the matrices that a block stacks: three copies in fp32
ROUNDING_BYTES = 64 << 20  # copies of the rows that are rounded to int8 at a time


@dataclass(frozen=True)
class Share:
    """What one of several processes holds of a model: a pipeline stage, or a tensor rank's part of one."""

    pp_rank: int = 0
    pp: int = 1
    tp_rank: int = 0
    tp: int = 1

    def stage(self, cfg: ModelConfig) -> tuple[Stage, range]:
        """The pipeline stage, and the numbers of its blocks."""
        cut = stages(cfg, self.pp, cfg.max_positions or 1)
        first = sum(stage.layers for stage in cut[: self.pp_rank])
        return cut[self.pp_rank], range(first, first + cut[self.pp_rank].layers)

    def part(self, name: str, ref: TensorRef) -> TensorRef:
        """This tensor rank's part of a tensor."""
        dim = row_of(name).tp_dim
        if dim is None:
            return ref
        size = ref.shape[dim] // self.tp
        return part(ref, self.tp_rank * size, (self.tp_rank + 1) * size, dim)


WHOLE = Share()


@dataclass(frozen=True)
class Unit:
    """Tensors that arrive together, by their names in the model."""

    tensors: Mapping[str, TensorRef]
    dtypes: Mapping[str, torch.dtype]  # in which they are held

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        """Where each tensor begins and ends in a buffer."""
        places, end = {}, 0
        for name, ref in self.tensors.items():
            begin = end + -end % PLACE  # rounded up
            end = begin + prod(ref.shape) * self.dtypes[name].itemsize
            places[name] = begin, end
        return places

    @property
    def num_bytes(self) -> int:
        """Of a buffer that holds it."""
        return max((end for _, end in self.places.values()), default=0)

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in a buffer of bytes."""
        with torch.inference_mode(False):  # in which threads may fill them
            return {
                # [bytes] -> [values] -> the tensor's shape, all in the same memory
                name: memory[begin:end].view(self.dtypes[name]).view(self.tensors[name].shape)
                for name, (begin, end) in self.places.items()
            }


@dataclass(frozen=True)
class ModelUnits:
    """A checkpoint's tensors as they are streamed, or a process's share of them."""

    blocks: tuple[Unit, ...]
    head: Unit  # empty for a model that predicts no tokens, and before the last stage
    rest: Unit  # always in memory
    embedding: TensorRef  # of which single rows are read, whole ones on all tensor ranks
    dtype: torch.dtype  # of the computation
    share: Share = WHOLE

    def sizes(self, packed_item: int = 0) -> StreamedSizes:
        """What the plan needs to know. `packed_item`: bytes of a value in packed blocks, for a model that is packed."""
        in_blocks = [ref for block in self.blocks for ref in block.tensors.values()]
        items = [(prod(b.tensors[name].shape), dtype.itemsize) for b in self.blocks for name, dtype in b.dtypes.items()]
        cast = [size for size, item in items if item < self.dtype.itemsize]
        largest_block = max(unit.num_bytes for unit in self.blocks)
        largest = max(ref.num_bytes for ref in in_blocks)
        # Tensors whose rows lie scattered in the files are read whole, beside the buffer that they go to.
        moved = [ref.num_bytes for ref in (*in_blocks, *self.head.tensors.values()) if not is_read_in_rows(ref)]
        stacked = sum(prod(ref.shape) for name, ref in self.blocks[0].tensors.items() if row_of(name).tp_dim == 0)
        packed = packed_item * max(sum(prod(ref.shape) for ref in block.tensors.values()) for block in self.blocks)
        head = packed_item * sum(prod(ref.shape) for ref in self.head.tensors.values())
        return StreamedSizes(
            blocks=tuple(unit.num_bytes for unit in self.blocks),
            head=self.head.num_bytes,
            rest=self.rest.num_bytes,
            read=tuple(sum(map(bytes_read, unit.tensors.values())) for unit in self.blocks),
            cast=0 if packed else max(cast, default=0) * self.dtype.itemsize,
            reading=READERS * (WINDOW_BYTES + 2 * min(PIECE_BYTES, largest)) + 2 * max(moved, default=0),
            packed=packed,
            # Blocks that stay are first read into memory of their own.
            packing=max(packed, head) + PACKING_COPIES * stacked + ROUNDING_BYTES + BUFFERS * largest_block
            if packed
            else 0,
        )


def units_of(checkpoint: Checkpoint, cfg: ModelConfig, dtype: torch.dtype, share: Share = WHOLE) -> ModelUnits:
    """The units of a checkpoint's model, or of a share of it, for a computation in `dtype`.

    Raises CheckpointError if it does not fit.
    """
    whole = fitting_tensors(cfg, checkpoint)
    refs = {name: share.part(name, ref) for name, ref in whole.items()}
    stage, numbers = share.stage(cfg)

    def unit(names: Iterable[str]) -> Unit:
        chosen = {name: refs[name] for name in names}
        return Unit(chosen, {name: read_dtype(ref, held_dtype(name, dtype)) for name, ref in chosen.items()})

    blocks = tuple(unit(n for n in refs if block_of(n) == layer) for layer in numbers)
    # A tied matrix has two uses: streamed whole as the head, and read by single rows as the embedding.
    has_head = stage.last and not cfg.reward_head
    head = ("embed.weight" if cfg.tie_embeddings else "head.weight",) if has_head else ()
    outside = [name for name in refs if not 0 <= block_of(name) < cfg.num_layers and name not in TOKEN_MATRICES]
    rest = [name for name in outside if (stage.first if block_of(name) < 0 else stage.last)]
    return ModelUnits(blocks, unit(head), unit(rest), whole["embed.weight"], dtype, share)


def read_dtype(ref: TensorRef, dtype: torch.dtype) -> torch.dtype:
    """The stored dtype, which layers cast where they use it, or `dtype`, of a model in memory, unless it is wider."""
    return ref.dtype if ITEM_BYTES[ref.dtype_name] < dtype.itemsize else dtype


def is_read_in_rows(ref: TensorRef) -> bool:
    """Whether some rows cost no more than their share of the tensor."""
    return not any(isinstance(each, (Permuted, Reordered, Transposed)) for each in everything([ref]))


def bytes_read(ref: TensorRef) -> int:
    """Bytes of the files that a tensor is read from. Of rows of which only some columns are wanted, all are."""
    if isinstance(ref, Part) and ref.dim > 0:
        source = ref.source
        cuts = {0, *source.ends} if isinstance(source, Joined) and source.dim == ref.dim else {0, source.shape[ref.dim]}
        if not {ref.start, ref.stop} <= cuts:
            return bytes_read(source)
        return bytes_read(source) * (ref.stop - ref.start) // source.shape[ref.dim]
    if isinstance(ref, Part) and is_read_in_rows(ref.source):
        return bytes_read(ref.source) * (ref.stop - ref.start) // max(1, ref.source.shape[0])
    if isinstance(ref, Wrapper):
        return bytes_read(ref.source)
    return sum(map(bytes_read, ref.sources)) if ref.sources else ref.num_bytes
