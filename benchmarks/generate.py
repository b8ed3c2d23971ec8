"""Greedy decoding side by side: ours against transformers' `generate` on the same random weights.

    python benchmarks/generate.py [--model pythia-14m] [--new 64] [--rounds 5] [--quick]

Both sides run in one process and take turns, with the same allocator setting; both must write the same tokens. Beside
them stands the floor: reading every weight that a token needs once, at the read bandwidth measured on an array of the
same bytes in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from train import Work, our_model, renamed
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from castalia.config.load import load_config
from castalia.config.schema import Model
from castalia.generate.engine import generate
from castalia.train.hardware import DTYPES, keep_freed_memory

TOLERANCE = {"fp32": 0.0, "bf16": 0.5}  # share of tokens that may differ: near ties fall either way in bf16


class Numbers:
    """A tokenizer whose text is the ids themselves, without an end of document, so that all tokens are written."""

    eod_id = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{number} " for number in ids)


def their_model(shape: Model, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> GPTNeoXForCausalLM:
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=shape.padded_vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.mlp_width,
            rotary_pct=shape.rotary_pct,
            max_position_embeddings=2048,
            hidden_act="gelu_new",
            use_parallel_residual=shape.parallel_residual,
            attn_implementation="sdpa",
        )
    )
    weights = dict(weights)
    model.get_output_embeddings().load_state_dict({"weight": weights.pop("head.weight")})
    model.gpt_neox.load_state_dict(renamed(weights))
    return model.to(dtype).eval()


def sides(shape: Model, precision: str, prompts: torch.Tensor, new: int) -> tuple[Callable, Callable]:
    """Functions that write `new` tokens after each prompt [rows, time] and return them as lists."""
    dtype = DTYPES[precision]
    ours = our_model(Work(shape, 1, 1, precision, "same"))
    theirs = their_model(shape, ours.state_dict(), dtype)
    ours = ours.to(dtype).eval()
    numbers = Numbers(shape.padded_vocab_size)
    padded = shape.model_copy(update={"vocab_size": shape.padded_vocab_size})
    ours.cfg = padded  # transformers writes padding rows too

    def write_ours() -> list[list[int]]:
        texts = generate(ours, numbers, prompts.tolist(), max_tokens=new, batch_size=len(prompts))
        return [numbers.encode(text) for text in texts]

    @torch.inference_mode()
    def write_theirs() -> list[list[int]]:
        mask = torch.ones_like(prompts)
        settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return theirs.generate(prompts, attention_mask=mask, **settings)[:, prompts.shape[1] :].tolist()

    return write_ours, write_theirs


def read_bandwidth(num_bytes: int) -> float:
    """Bytes a second: the best of a few sums over an array."""
    array = torch.ones(num_bytes // 4)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-14m", help="a preset of the GPT-NeoX family")
    parser.add_argument("--new", type=int, default=64, help="tokens written for each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="8 tokens, 2 rounds: does it run and agree?")
    args = parser.parse_args()
    if args.quick:
        args.new, args.rounds = 8, 2
    keep_freed_memory()
    shape = load_config(args.model).model
    print(f"{args.model}, {args.new} tokens after 16, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| precision | rows | ours tokens/s | transformers tokens/s | ratio | of the read bandwidth |")
    print("|---|---|---|---|---|---|")
    for precision in ("fp32", "bf16"):
        for rows in (1, 16):
            prompts = torch.randint(0, 50000, (rows, 16), generator=torch.Generator().manual_seed(rows))
            writers = sides(shape, precision, prompts, args.new)
            first, second = (write() for write in writers)  # warm-up
            pairs = [pair for a, b in zip(first, second, strict=True) for pair in zip(a, b, strict=True)]
            if sum(a != b for a, b in pairs) > TOLERANCE[precision] * len(pairs):
                raise AssertionError(f"{precision}, {rows} rows: the sides write different tokens")
            seconds: tuple[list[float], list[float]] = ([], [])
            for _ in range(args.rounds):
                for write, taken in zip(writers, seconds, strict=True):
                    start = time.perf_counter()
                    write()
                    taken.append(time.perf_counter() - start)
            mine, peers = (rows * args.new / statistics.median(taken) for taken in seconds)
            needed = (shape.num_layers * 12 * shape.hidden_size**2 + shape.padded_vocab_size * shape.hidden_size) * (
                4 if precision == "fp32" else 2
            )
            share = mine / rows * needed / read_bandwidth(needed)
            print(f"| {precision} | {rows} | {mine:.0f} | {peers:.0f} | {mine / peers:.2f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
