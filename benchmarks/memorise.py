"""Which sequences a model knows by heart: one pass over each against decoding it, on the same weights.

    python benchmarks/memorise.py [--model pythia-14m] [--sequences 64] [--prompt 32] [--continuation 32] [--rounds 3]

Half of the sequences are the model's own greedy texts, so that it knows them; both sides must find the same ones.
Decoding is ours, greedy, with its cache, in batches as large: a pass for each token of the continuation.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import results
import torch
from generate import Numbers

from castalia.config.load import load_config
from castalia.config.schema import complete
from castalia.generate.generation import generate
from castalia.model.init import initialize
from castalia.model.transformer import Transformer
from castalia.series.memorise import ROWS, Panel, judge_panel


def decoded(model: Transformer, prompts: np.ndarray, count: int, vocabulary: int) -> np.ndarray:
    """The tokens that greedy decoding puts after each prompt: [rows, count]."""
    texts = generate(
        model, Numbers(vocabulary), [tuple(row) for row in prompts.tolist()], max_tokens=count, batch_size=ROWS
    )
    return np.array([[int(word) for word in text.split()] for text in texts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-14m")
    for name, value in (("sequences", 64), ("prompt", 32), ("continuation", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    results.option(parser)
    given = parser.parse_args()
    config = load_config([given.model], ["model.vocab_size=50277", "train.steps=1"])
    shape = complete(config).model
    model = Transformer(shape)
    initialize(model, shape, seed=1)
    model.eval()
    vocabulary = shape.vocab_size or shape.padded_vocab_size
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, vocabulary, (given.sequences, given.prompt + given.continuation))
    known = given.sequences // 2
    tokens[:known, given.prompt :] = decoded(model, tokens[:known, : given.prompt], given.continuation, vocabulary)
    panel = Panel(tokens, (None,) * given.sequences, given.prompt)
    times: dict[str, list[float]] = {"one pass": [], "decoding": []}
    for _ in range(given.rounds):
        begin = time.perf_counter()
        found = [row["extractable"] for row in judge_panel(model, panel, vocabulary)]
        middle = time.perf_counter()
        written = decoded(model, tokens[:, : given.prompt], given.continuation, vocabulary)
        times["one pass"].append(middle - begin)
        times["decoding"].append(time.perf_counter() - middle)
        assert found == (written == tokens[:, given.prompt :]).all(1).tolist() and sum(found) >= known
    for name, each in times.items():
        results.record(name, each)
    pace = {name: given.sequences / statistics.median(each) for name, each in times.items()}
    print(f"{given.model}, {torch.get_num_threads()} threads, {given.prompt} + {given.continuation} tokens")
    print("  ".join(f"{name} {value:.0f} sequences/s" for name, value in pace.items()))
    print(f"ratio {pace['one pass'] / pace['decoding']:.1f}")


if __name__ == "__main__":
    main()
