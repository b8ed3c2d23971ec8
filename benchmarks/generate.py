"""Greedy decoding and reading of prompts side by side: ours against transformers' `generate` on the same weights.

    python benchmarks/generate.py [--model pythia-14m] [--new 64] [--rounds 5] [--cpu-time] [--quick] [--json FILE]

Both sides run in one process and take turns, with the same allocator setting; both must write the same tokens, but for
near ties where weights are rounded. Beside them stands the floor: for each token, the longer of reading every weight
that it needs once, at the read bandwidth measured on an array of the same bytes in the same run, and of its operations
at the matmul rate of the same run; for a prompt its operations. MBU, memory bandwidth utilisation, is the bytes of
weights, keys and values that decoding has to read, per second, over that bandwidth. int8 weights are ours alone and
race against transformers' fp32. On a machine that is busy with other work `--cpu-time` takes one thread for both sides
and counts the seconds that they compute instead of those that pass.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import results
import torch
from train import Work, matmul_rate, our_model, renamed, their_config, use_clock

from castalia.config.load import load_config
from castalia.config.schema import ModelConfig
from castalia.generate.generation import generate
from castalia.generate.packed_model import pack
from castalia.machine import keep_freed_memory
from castalia.train.hardware import DTYPES

# Share of tokens that may differ. The logits of random weights lie close together, and after one near tie that falls
# the other way nothing is alike any more.
TOLERANCE = {"fp32": 1e-5, "bf16": 2**-5, "int8": 2**-4}
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
PROMPT, LONG_PROMPT, ROWS = 16, 2048, 16


@dataclass(frozen=True)
class Row:
    """One line of the table: `prompts` of token ids, and how many tokens are written after each."""

    name: str
    prompts: list[list[int]]
    new: int


class Numbers:
    """A tokenizer whose text is the ids themselves, without an end of document, so that all tokens are written."""

    eod_id = None
    end_ids: frozenset[int] = frozenset()
    byte_ids: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{number} " for number in ids)


def their_model(shape: ModelConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    from transformers import GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(their_config(shape, 2048, use_cache=True))
    weights = dict(weights)
    model.get_output_embeddings().load_state_dict({"weight": weights.pop("head.weight")})
    model.gpt_neox.load_state_dict(renamed(weights))
    return model.to(dtype).eval()


Writer = Callable[[Row], list[list[int]]]
Judge = Callable[[list[int]], torch.Tensor]
Clock = Callable[[], float]


def sides(shape: ModelConfig, precision: str) -> tuple[Writer, Writer, Judge]:
    """Functions that write after each prompt of a row, and the peer's logits after some tokens.

    Both have the same weights; for int8 the peer has them in fp32.
    """
    dtype = DTYPES["bf16" if precision == "int8" else precision]
    plain = our_model(Work(shape, 1, 1, precision.replace("int8", "bf16"), "same"))
    theirs = their_model(shape, plain.state_dict(), torch.float32 if precision == "int8" else dtype)
    plain.to(dtype).eval().requires_grad_(False)
    numbers = Numbers(shape.padded_vocab_size)
    plain.cfg = shape.model_copy(update={"vocab_size": shape.padded_vocab_size})  # transformers writes padding rows too
    ours = {}
    for count in (1, ROWS):
        ours[count] = deepcopy(plain)
        pack(ours[count], int8=precision == "int8", rows=count)

    def write_ours(row: Row) -> list[list[int]]:
        count = len(row.prompts)
        texts = generate(ours[count], numbers, row.prompts, max_tokens=row.new, batch_size=count)
        return [numbers.encode(text) for text in texts]

    @torch.inference_mode()
    def write_theirs(row: Row) -> list[list[int]]:
        longest = max(map(len, row.prompts))
        tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in row.prompts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in row.prompts])
        settings = {"max_new_tokens": row.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return theirs.generate(tokens, attention_mask=mask, **settings)[:, longest:].tolist()

    @torch.inference_mode()
    def judge(ids: list[int]) -> torch.Tensor:
        return theirs(torch.tensor([ids])).logits[0, -1].float()

    return write_ours, write_theirs, judge


def rows(new: int, quick: bool) -> list[Row]:
    generator = torch.Generator().manual_seed(0)

    def prompt(length: int) -> list[int]:
        return torch.randint(0, 50000, (length,), generator=generator).tolist()

    ragged = [prompt(PROMPT // 2 + 2 * i) for i in range(ROWS)]
    long = prompt(LONG_PROMPT // (16 if quick else 1) - 1)
    return [
        Row("decode, 1 row", [prompt(PROMPT)], new),
        Row(f"decode, {ROWS} ragged rows", ragged, new),
        Row(f"prompt of {len(long)}", [long], 1),
    ]


def check(row: Row, ours: list[list[int]], theirs: list[list[int]], judge: Judge, tolerance: float) -> None:
    """AssertionError where the first token that differs is not as good as the peer's: random weights have near ties."""
    for prompt, mine, other in zip(row.prompts, ours, theirs, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), None)
        if same is not None:
            logits = judge(prompt + other[:same])
            gap = (logits.max() - logits[mine[same]]) / logits.abs().max()
            if gap > tolerance:
                raise AssertionError(f"{row.name}: token {same} differs, worse by {gap:.2g} of the largest logit")


def race(
    writers: tuple[Writer, Writer, Judge], row: Row, rounds: int, tolerance: float, clock: Clock
) -> tuple[list[float], list[float]]:
    """Seconds of each side's rounds, interleaved."""
    *writers, judge = writers
    check(row, *(write(row) for write in writers), judge, tolerance)  # warm-up
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for write, taken in zip(writers, seconds, strict=True):
            start = clock()
            write(row)
            taken.append(clock() - start)
    return seconds


@dataclass(frozen=True)
class Needs:
    """What a row cannot do without: bytes to read while decoding, and operations."""

    num_bytes: float
    flops: float
    seconds: float  # at the machine's measured limit
    bandwidth: float  # bytes a second


def needs(shape: ModelConfig, row: Row, precision: str, clock: Clock) -> Needs:
    matrices = shape.num_layers * 12 * shape.hidden_size**2
    head = shape.padded_vocab_size * shape.hidden_size
    weights = (matrices + head) * BYTES[precision]
    kv = 2 * 4 * shape.num_layers * shape.kv_heads * shape.head_size  # bytes of a token, which are fp32
    lengths = [len(prompt) for prompt in row.prompts]
    tokens, count = sum(lengths), len(lengths)
    attention = 2 * shape.num_layers * shape.hidden_size * sum(n**2 for n in lengths)  # the causal half of 2 products
    prefill = 2 * (matrices * tokens + head * count) + attention
    bandwidth = read_bandwidth(weights, clock)
    rate = matmul_rate(DTYPES["fp32" if precision == "fp32" else "bf16"], clock)
    step_flops = 2 * (matrices + head) * count
    num_bytes, seconds, flops = 0.0, prefill / rate, float(prefill)
    for new in range(1, row.new):
        read = weights + kv * (tokens + new * count)
        num_bytes, flops = num_bytes + read, flops + step_flops
        seconds += max(read / bandwidth, step_flops / rate)
    return Needs(num_bytes, flops, seconds, bandwidth)


def read_bandwidth(num_bytes: int, clock: Clock) -> float:
    """Bytes a second: the fastest of a few sums over an array."""
    array, taken = torch.ones(num_bytes // 4), []
    for _ in range(9):
        start = clock()
        array.sum()
        taken.append(clock() - start)
    return num_bytes / min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-14m", help="a preset of the GPT-NeoX family")
    parser.add_argument("--new", type=int, default=64, help="tokens written for each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=list(BYTES), action="append", help="default: all")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for a machine that others share")
    results.option(parser)
    parser.add_argument("--quick", action="store_true", help="8 tokens, 2 rounds: does it run and agree?")
    args = parser.parse_args()
    if args.quick:
        args.new, args.rounds = 8, 2
    keep_freed_memory()
    clock = use_clock(args.cpu_time)
    shape = load_config(args.model).model
    print(f"{args.model}, {args.new} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"fastest (median) of {args.rounds} rounds in turns, {'CPU time' if args.cpu_time else 'wall clock'}\n")
    print("| precision | what | ours ms | tokens/s | transformers ms | ratio | of the floor | MBU |")
    print("|---|---|---|---|---|---|---|---|")
    for precision in args.precision or BYTES:
        writers = sides(shape, precision)
        for row in rows(args.new, args.quick):
            seconds = race(writers, row, args.rounds, TOLERANCE[precision], clock)
            results.record(f"{args.model}, {precision}, {row.name}", seconds[0], "cpu" if args.cpu_time else "wall")
            (mine, median), (peers, others) = ((min(side), statistics.median(side)) for side in seconds)
            tokens = len(row.prompts) * row.new if row.new > 1 else len(row.prompts[0])
            least = needs(shape, row, precision, clock)
            cells = [
                *(precision, row.name),
                f"{mine * 1e3:.1f} ({median * 1e3:.1f})",
                f"{tokens / mine:,.0f}",
                f"{peers * 1e3:.1f} ({others * 1e3:.1f})",
                f"{peers / mine:.2f} ({others / median:.2f})",
                f"{least.seconds / mine:.0%}",
                f"{least.num_bytes / mine / least.bandwidth:.0%}" if row.new > 1 else "",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
