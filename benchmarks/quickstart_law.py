"""What `castalia start` knows: learning rates at two widths, and losses by size and tokens, on examples/kjv.

    python benchmarks/quickstart_law.py [--runs rates|law|all] [--threads 1] > runs.jsonl

Each line is one run: layers, width, rate, batch and trained tokens, and the bits per byte of the text that was held
out. Vocabulary 2,048, sequences of 256, the family and the schedule of `castalia start`. All runs take about half an
hour on two cores. What they said stands in castalia/quickstart/measured.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import results
import torch

from castalia.config.load import load_config
from castalia.config.schema import RunConfig, TokenizerConfig
from castalia.data.prepare import Recipe, prepare
from castalia.data.sources import documents
from castalia.data.tokenizer import load_tokenizer, train_bpe
from castalia.evaluate.perplexity import bits_per_byte, evaluate, windows
from castalia.evaluate.token_stream import indexed_stream
from castalia.files import write_text
from castalia.plan.count import non_embedding
from castalia.quickstart.corpus import hold_out
from castalia.quickstart.family import architecture, rate_groups
from castalia.train.setup import start

KJV = Path(__file__).parent.parent / "examples/kjv/kjv.jsonl"
VOCABULARY, LENGTH, BATCH = 2048, 256, 8
# layers, width, rate, sequences of a batch, tokens
K = 1024
RATES = [(2, 64, rate, BATCH, 256 * K) for rate in (0.004, 0.008, 0.016, 0.032)]
RATES += [(4, 128, rate, BATCH, 256 * K) for rate in (0.004, 0.008, 0.016)]
LAW = ((2, 64, 256), (2, 64, 512), (4, 128, 512), (3, 96, 512), (2, 64, 1024), (4, 128, 1024), (4, 192, 512))
LAW += ((2, 64, 2048), (3, 96, 1024), (6, 256, 512), (4, 192, 1024), (4, 128, 2048), (2, 64, 4096))


def config_of(folder: Path, layers: int, width: int, rate: float, batch: int, tokens: int) -> RunConfig:
    return load_config(
        [
            {
                "model": architecture(layers, width, VOCABULARY, LENGTH),
                "data": {"train": str(folder / "train"), "valid": str(folder / "valid"), "seq_length": LENGTH},
                "tokenizer": {"path": str(folder / "tokenizer.json")},
                "optimizer": {"lr": rate, "betas": [0.9, 0.95], "weight_decay": 0.1, "groups": rate_groups(width)},
                "schedule": {"style": "linear", "warmup": 0.05},
                "train": {"steps": tokens // (batch * LENGTH), "batch_size": batch},
                "checkpoint": {"dir": str(folder / "run")},
            }
        ]
    )


def run(folder: Path, layers: int, width: int, rate: float, batch: int, tokens: int) -> dict[str, float]:
    session = start(config_of(folder, layers, width, rate, batch, tokens))
    begin = time.process_time()
    for number in range(session.last):
        session.step(number, session.batch(number))
    seconds = time.process_time() - begin
    stream = indexed_stream(str(folder / "valid"), None, load_tokenizer(session.config.tokenizer))
    found = evaluate(session.executor, windows(stream.tokens, LENGTH, LENGTH, 8))
    assert stream.num_bytes
    bpb = bits_per_byte(found["loss"], int(found["tokens"]), stream.num_bytes)
    return {
        "layers": layers, "width": width, "parameters": non_embedding(session.config.model), "rate": rate,
        "batch": batch, "tokens": tokens, "bits_per_byte": round(bpb, 4), "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="all", choices=("rates", "law", "all"))
    parser.add_argument("--rate", type=float, default=0.006, help="of the runs for the law")
    parser.add_argument("--threads", type=int, default=1)
    results.option(parser)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bpe = train_bpe(documents([KJV]), VOCABULARY)
        write_text(folder / "tokenizer.json", bpe.engine.to_str())
        prepare([KJV], folder / "kjv", Recipe(TokenizerConfig(path=str(folder / "tokenizer.json")), append_eod=True))
        hold_out([str(folder / "kjv_text_document")], str(folder / "train"), str(folder / "valid"), 0.05)
        runs = RATES if asked.runs != "law" else []
        runs += [(*size, asked.rate, BATCH, tokens * K) for *size, tokens in LAW] if asked.runs != "rates" else []
        for each in runs:
            found = run(folder, *each)
            print(json.dumps(found), flush=True)
            name = "{layers} x {width}, rate {rate}, {tokens} tokens".format(**found)
            results.record(name, [found["cpu_seconds"]], "cpu")


if __name__ == "__main__":
    main()
