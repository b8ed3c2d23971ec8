"""Answers to tasks side by side: ours against lm-eval's own model of transformers, on the same weights and requests.

    python benchmarks/tasks.py [--model pythia-70m] [--documents 48] [--rounds 3] [--quick]

Both sides get the same token ids, so that no tokenizer is timed, and take turns. lm-eval's side runs with each batch
size of 1, 4, 16 and 64, of which the fastest counts; both must give the same scores. Times are of the CPU, since other
work on the machine moves wall clock more. Beside them stands the floor: the operations of all different tokens, and of
the rows that the head needs, at the matmul rate of the same run.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import results
import torch
from generate import Numbers, their_model
from train import Work, our_model

from castalia.config.load import load_config
from castalia.config.schema import ModelConfig
from castalia.evaluate.prefix_tree import build_tree, pieces
from castalia.machine import keep_freed_memory
from castalia.tasks.harness import TaskModel
from castalia.train.hardware import present_flops

Request = tuple[tuple[str, str], list[int], list[int]]
BATCH_SIZES = (1, 4, 16, 64)


class Words(Numbers):
    """Numbers as a tokenizer of which lm-eval asks a beginning and an end."""

    eod_id, bos_id, kind = 0, None, "numbers"

    def encode_batch(self, texts: list[str], *, bare: bool = False) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def requests(shape: ModelConfig, documents: int, shots: int) -> list[Request]:
    """Questions of 40 tokens with four answers of 6, each after examples of 50 tokens that all questions share."""
    rng = random.Random(1)

    def ids(count: int) -> list[int]:
        return [rng.randrange(1, 50_000) for _ in range(count)]

    examples = ids(50 * shots)
    asked: list[Request] = []
    for number in range(documents):
        question = examples + ids(40)
        asked += [((str(number), str(choice)), question, ids(6)) for choice in range(4)]
    return asked


def floor_seconds(shape: ModelConfig, asked: list[Request], rate: float) -> float:
    sequences = sorted({(*context, *tokens)[:-1] for _, context, tokens in asked})
    different = sum(piece.size for piece in pieces(build_tree(sequences)))
    h, blocks = shape.hidden_size, 12 * shape.hidden_size**2 * shape.num_layers
    head_rows = sum(len(tokens) for _, _, tokens in asked) - 3 * len(asked) // 4  # first tokens share a row of four
    return 2 * (different * blocks + head_rows * h * shape.padded_vocab_size) / rate


def timed(call: Callable[[], list], rounds: int, row: str = "") -> tuple[float, list]:
    taken = []
    for _ in range(rounds):
        begin = time.process_time()
        result = call()
        taken.append(time.process_time() - begin)
    if row:
        results.record(row, taken, "cpu")
    return min(taken), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-70m")
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    results.option(parser)
    args = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    keep_freed_memory()
    shape = load_config([args.model]).model
    if args.quick:
        shape = shape.model_copy(update={"num_layers": 1, "hidden_size": 64, "num_heads": 2, "mlp_size": None})
        args.documents, args.rounds = 4, 1
    plain = our_model(Work(shape, 1, 1, "fp32", "same")).eval().requires_grad_(False)
    theirs = HFLM(pretrained=their_model(shape, plain.state_dict(), torch.float32), tokenizer=_tokenizer())
    ours = TaskModel(plain, Words(shape.padded_vocab_size))
    rate = present_flops(torch.float32)
    print(f"{args.model}, fp32, {args.documents} questions of 40 tokens with 4 answers of 6; {rate / 1e9:.0f} GFLOP/s")
    print("| shots | ours, CPU s | lm-eval's hf, CPU s | best batch | times as fast | of the floor |")
    print("|---|---|---|---|---|---|")
    for shots in (0, 5):
        asked = requests(shape, args.documents, shots)
        mine, scores = timed(lambda asked=asked: ours._loglikelihood_tokens(asked), args.rounds, f"{shots} shots")
        other, batch = float("inf"), 0
        for size in BATCH_SIZES:
            theirs.batch_size_per_gpu = size
            seconds, found = timed(lambda asked=asked: theirs._loglikelihood_tokens(asked, True), 1)
            worst = max(abs(a - b) for (a, _), (b, _) in zip(scores, found, strict=True))
            assert worst < 1e-3 and [g for _, g in scores] == [g for _, g in found], worst
            if seconds < other:
                other, batch = seconds, size
        floor = floor_seconds(shape, asked, rate)
        print(f"| {shots} | {mine:.2f} | {other:.2f} | {batch} | {other / mine:.1f} | {floor / mine:.0%} |", flush=True)


def _tokenizer() -> object:
    """Any, as requests are ids already."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<end>")


if __name__ == "__main__":
    main()
