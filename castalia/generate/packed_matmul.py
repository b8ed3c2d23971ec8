"""Products with weights in the form in which a CPU multiplies few rows by them fastest.

With one row, the time should be that of reading the weights; with more rows, their order in memory matters, too.
Weights have the precision in the name of the class. Inputs and outputs are fp32, but for the outputs of prompts where
`narrow` says so: they stay bf16, as the kernel gives them, so that what comes next moves half of the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.generate.fastest import Ways, fastest
from castalia.storage.lazy import name_of

ROUNDED = 1 << 22  # elements that are rounded to int8 at a time
WIDENED = 1 << 20  # elements of int8 weights that are widened at a time
SHARES = 8  # at least, where one row is multiplied in shares
PROBE = (8192, 1024)  # weights [out, in] with which the ways to multiply one row are measured
FEWEST = 4  # rows to which fewer are filled up, where oneDNN's kernels want that (see `fewest_rows`)
# oneDNN adds up a single row by fp32 weights in another order than several, which a text must not depend on.
LEAST = {torch.float32: 2, torch.bfloat16: 1}
FEW = 12  # rows; with more, widening int8 weights costs less than a kernel that does row after row
LARGE = 1 << 22  # elements of int8 weights, by which a single row is multiplied in parts, too
LARGEST = 127 * 256  # of the numbers that two 8-bit parts make
PART_ROWS = 64  # with more, widening int8 weights costs less than twice the rows
_BOTH_ZEROS = torch.tensor(128 * 256 + 128 + 0.5)  # both parts' zero, and what makes of cutting off rounding


class Fp32Product(nn.Module):
    """fp32 weights [out, in].

    For one row, weights keep their order, and whichever is faster on this machine is done: one product, or one in
    shares (see `takes_shares`). For several rows, they are in oneDNN's order, which takes half the time of MKL's.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach().float(), None if bias is None else bias.detach().float()
        self.multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
        if torch.backends.mkldnn.is_available():
            self.multiply = partial(few_rows, fewest=fewest_rows(torch.float32))
        self.shares: Tensor | None = None
        self.reordered = rows > 1 and self.multiply is not F.linear
        if self.reordered:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, max(rows, FEWEST))
        elif takes_shares():
            self._share()

    def _share(self) -> None:
        self.out, count = len(self.weight), number_of_shares(torch.get_num_threads())
        missing = -self.out % count
        whole, biases = self.weight, self.bias
        if missing:
            whole, biases = F.pad(whole, (0, 0, 0, missing)), None if biases is None else F.pad(biases, (0, missing))
            self.weight = whole[: self.out]
        self.shares = whole.view(count, -1, whole.shape[1])
        self.biases = None if biases is None else biases.view(count, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.reordered or x.numel() != x.shape[-1]:
            return self.multiply(x, self.weight, self.bias)
        if self.shares is None:
            row = x.view(-1)
            out = self.weight.mv(row) if self.bias is None else torch.addmv(self.bias, self.weight, row)
            return out.view(*x.shape[:-1], -1)
        out = in_shares(x, self.shares, self.biases).view(-1)
        return out[: self.out].view(*x.shape[:-1], self.out)


def in_shares(x: Tensor, shares: Tensor, biases: Tensor | None) -> Tensor:
    """One row x [..., in] by weights [shares, outputs, in] -> [shares, outputs, 1]."""
    # Any other view of x [in] as columns [shares, in, 1] is five times slower.
    columns = x.view(1, 1, -1).expand(len(shares), -1, -1).transpose(1, 2)
    return shares @ columns if biases is None else torch.baddbmm(biases, shares, columns)


def number_of_shares(threads: int) -> int:
    """As many for each thread."""
    return threads * math.ceil(SHARES / threads)


@cache
def takes_shares() -> bool:
    """Whether one row is multiplied by fp32 weights faster in shares.

    MKL takes twice to three times as long for one product of a matrix and a row on AMD's processors, and for the
    shares on Intel's.
    """

    def ways() -> Ways:
        rows, width = PROBE
        shares, row = torch.ones(SHARES, rows // SHARES, width), torch.ones(width)
        return {
            "one product": lambda: shares.view(-1, width).mv(row),
            "shares": lambda: in_shares(row, shares, None),
        }

    return fastest("one row by fp32 weights", ways) == "shares"


def in_prompt(x: Tensor) -> bool:
    """Whether x [b, t, ...] has several tokens of a text, which only a prompt gives at a time."""
    return x.dim() > 2 and x.shape[1] > 1


class RoundedProduct(nn.Module):
    """A product with weights of fewer bits than fp32."""

    narrow = False  # whether outputs of prompts stay bf16

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        """What the kernel gives for x, in the precision that comes next."""
        return out.bfloat16() if self.narrow and in_prompt(x) else out.float()


class Bf16Product(RoundedProduct):
    """bf16 weights in oneDNN's order; in any other, its kernels would reorder them in every call."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), max(rows, FEWEST))
        self.bias = None if bias is None else bias.bfloat16()
        # With several texts at a time, a single row must get the bits that it has among them: those of FEWEST.
        self.fewest = fewest_rows(torch.bfloat16) if rows == 1 else FEWEST

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.output(few_rows(x.bfloat16(), self.weight, self.bias, self.fewest), x)


class SmallProduct(nn.Module):
    """Weights that lie in a core's cache: fp32, whose kernels have the least overhead, and bf16 for narrow prompts."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.few, self.many = Fp32Product(weight, bias, rows), Bf16Product(weight, bias, rows)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return (self.many if self.many.narrow and in_prompt(x) else self.few)(x)


class Int8Product(RoundedProduct):
    """int8 weights with a scale for each output, which is bf16 as the kernel needs it: weight = code * scale."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.scale, self.codes = _rounded(weight)
        self.bias = None if bias is None else bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        out = self._widened(rows) if len(rows) > FEW else torch._weight_int8pack_mm(rows, self.codes, self.scale)
        out = self.output(out.view(*x.shape[:-1], -1), x)
        return out if self.bias is None else out.add_(self.bias)

    def _widened(self, rows: Tensor) -> Tensor:
        """The product by weights that are widened to bf16, some at a time, which a core's cache keeps."""
        parts = self.codes.split(max(1, WIDENED // rows.shape[1]))
        buffer, out, end = (
            torch.empty_like(parts[0], dtype=torch.bfloat16),
            rows.new_empty(len(rows), len(self.codes)),
            0,
        )
        for part in parts:
            begin, end = end, end + len(part)
            out[:, begin:end] = F.linear(rows, buffer[: len(part)].copy_(part))
        return out.mul_(self.scale)


class Int8PartsProduct(RoundedProduct):
    """The same weights and scales, multiplied as they are by inputs of two 8-bit parts, with exact sums.

    An input is its row's largest value times (256 high + low) / LARGEST, which is as close as 1/65,000 of the largest;
    both parts are rows of one product, for which weights need not be widened.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        scale, codes = _rounded(weight)
        self.scale, self.zeros = scale.float(), torch.zeros(len(scale), dtype=torch.int64)
        self.weight = torch.ops.onednn.qlinear_prepack(codes, [max(2 * rows, FEWEST), codes.shape[1]])
        self.bias = None if bias is None else bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        out = self._in_parts(rows) if len(rows) <= PART_ROWS else self._widened(rows.bfloat16())
        return self.output(out.view(*x.shape[:-1], -1), x)

    def _in_parts(self, rows: Tensor) -> Tensor:
        """[rows, in] -> fp32 [rows, out]."""
        rows = rows.float()
        largest = torch.linalg.vector_norm(rows, math.inf, -1, keepdim=True) + 1e-30  # [rows, 1]
        # Whole numbers from 0 on, whose two lower bytes are low + 128 and high + 128.
        numbers = torch.addcmul(_BOTH_ZEROS, rows, LARGEST / largest).int()
        parts = numbers.view(torch.uint8).view(*rows.shape, 4)[..., :2].permute(2, 0, 1)  # [2, rows, in]
        out = torch.ops.onednn.qlinear_pointwise(
            *(parts.reshape(2 * len(rows), -1), 1.0, 128, self.weight, self.scale, self.zeros),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        low, high = out.chunk(2)
        out = torch.add(low, high, alpha=256).mul_(largest / LARGEST)
        return out if self.bias is None else out.add_(self.bias)

    def _widened(self, rows: Tensor) -> Tensor:
        """bf16 [rows, in] -> [rows, out]."""
        out, scale = torch.mm(rows, self.weight.to_dense().bfloat16()), self.scale.bfloat16()
        return out.mul_(scale) if self.bias is None else torch.addcmul(self.bias.bfloat16(), out, scale)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The scale [out] and the codes [out, in] of a matrix.

    Some rows at a time: several fp32 copies of all would not fit beside a model that only just does.
    """
    parts = [_rounded_rows(some) for some in weight.split(max(1, ROUNDED // weight.shape[1]))]
    return torch.cat([scale for scale, _ in parts]), torch.cat([codes for _, codes in parts])


def int8_product(weight: Tensor, bias: Tensor | None, rows: int) -> nn.Module:
    """The product with int8 weights that is the fastest for so many rows.

    What parts of a single row save in a small matrix, making them costs.
    """
    in_parts = (rows > 1 or weight.numel() >= LARGE) and multiplies_in_parts(alone=rows == 1)
    return (Int8PartsProduct if in_parts else Int8Product)(weight, bias, rows)


@cache
def multiplies_in_parts(alone: bool) -> bool:
    """Whether a row `alone`, or 16 rows, are multiplied by int8 weights faster in two parts.

    That takes instructions that add without overflow (VNNI).
    """
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return False
    number = 1 if alone else 16

    def ways() -> Ways:
        weight, rows = torch.ones(PROBE), torch.ones(number, PROBE[1])
        widened, in_parts = Int8Product(weight, None, number), Int8PartsProduct(weight, None, number)
        return {"widened": lambda: widened(rows), "in parts": lambda: in_parts(rows)}

    return fastest(f"{number} rows by int8 weights", ways) == "in parts"


def _rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same of some rows."""
    wide = weight.float()
    scale = (wide.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
    return scale, (wide / scale[:, None].float()).round().clamp(-127, 127).char()


@cache
def fewest_rows(dtype: torch.dtype) -> int:
    """Rows to which a single one is filled up, as that takes the least time: FEWEST or `LEAST`."""

    def ways() -> Ways:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(PROBE, dtype=dtype), FEWEST)
        row = torch.ones(1, PROBE[1], dtype=dtype)
        numbers = (LEAST[dtype], FEWEST)
        return {str(number): partial(few_rows, row, weight, None, number) for number in numbers}

    found = fastest(f"rows for one, by {name_of(dtype)} weights in oneDNN's order", ways)
    return FEWEST if found == str(FEWEST) else LEAST[dtype]


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, fewest: int) -> Tensor:
    """x weight^T + bias by oneDNN, with `fewest` rows or more. `weight` [out, in] may be in oneDNN's order or not."""
    rows = x.numel() // x.shape[-1]
    if rows >= fewest:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    filled = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, fewest - rows))
    out = torch.ops.mkldnn._linear_pointwise(filled, weight, bias, "none", [], "")
    return out[:rows].view(*x.shape[:-1], out.shape[-1])
