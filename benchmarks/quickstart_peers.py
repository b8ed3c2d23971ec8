"""The same minutes on the same text: `castalia start` beside what a person gets from transformers' defaults.

    python benchmarks/quickstart_peers.py [FOLDER] [--minutes 3] [--threads 2] [--gpt2]

Each side has the whole time for training; looking, tokenizers and judging come on top for both. The peer is a
GPT2LMHeadModel in the loop that TrainingArguments' defaults describe: AdamW at 5e-5 without weight decay, a rate that
falls linearly to nothing, batches of 8, gradients clipped at 1, fp32. GPT-2's own size (124M) and length of 1,024
(--gpt2) make a step in a minute on two cores, so there is what its user would try next: the size, the length and the
tokenizer that castalia chose, `transformers, small`; and that at 20 times the rate, `tuned rate`. All sides see the
held-out text only when they are judged, in windows of their own length. Bits per byte count all of its bytes, so that
other lengths and vocabularies compare. `cores` says how much of the machine each got: CPU seconds a second, of the
whole command for castalia, of the training for the others; on a machine that others use they have to be alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import results
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from castalia.config.load import load_run
from castalia.data.indexed import open_dataset
from castalia.data.tokenizer import load_tokenizer
from castalia.evaluate.perplexity import bits_per_byte
from castalia.evaluate.token_stream import indexed_stream

KJV = Path(__file__).parent.parent / "examples/kjv"
BATCH, RATE = 8, 5e-5  # TrainingArguments' defaults


class Peer(NamedTuple):
    name: str
    layers: int
    width: int
    heads: int
    length: int
    rate: float


def ours(folder: Path, output: Path, minutes: float, threads: int) -> dict:
    """`castalia start` with so many minutes of training."""
    words = [f"train.max_hours={minutes / 60}"]
    command = [sys.executable, "-m", "castalia", "start", str(folder), "--output", str(output), "--hours"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    subprocess.run([*command, str(minutes / 60 / 0.85), *words], check=True, env=environment, stdout=sys.stderr)
    used, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begin
    report = subprocess.run(
        [sys.executable, "-m", "castalia", "report", str(output), "--json"], check=True, capture_output=True, text=True
    )
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    parameters = json.loads((output / "start.json").read_text())["choice"]["parameters"]
    return {
        "name": "castalia start",
        "parameters": parameters,
        "steps": records[-1]["step"],
        "tokens": records[-1]["tokens"],
        "training_seconds": sum(record["seconds"] for record in records),
        "seconds": wall,
        "cores": (used.ru_utime + used.ru_stime) / wall,
        "bits_per_byte": json.loads(report.stdout)["score"]["bits_per_byte"],
    }


def theirs(peer: Peer, run: Path, minutes: float) -> dict:
    """A plain loop for so many minutes. Its rate falls with the time, which it does not have to foretell."""
    config = load_run(run)
    tokenizer = load_tokenizer(config.tokenizer)
    text = np.concatenate(list(open_dataset(config.data.train[0].path))).astype(np.int64)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokenizer.vocab_size, n_positions=peer.length, n_embd=peer.width, n_layer=peer.layers,
            n_head=peer.heads, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peer.rate, weight_decay=0.0)
    random, begin, cpu, step = np.random.default_rng(0), time.perf_counter(), time.process_time(), 0
    while (spent := (time.perf_counter() - begin) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = peer.rate * (1 - spent)
        starts = random.integers(0, len(text) - peer.length, BATCH)
        batch = torch.from_numpy(np.stack([text[start : start + peer.length] for start in starts]))
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    wall, used = time.perf_counter() - begin, time.process_time() - cpu
    return {
        "name": peer.name,
        "parameters": sum(each.numel() for each in model.parameters()),
        "steps": step,
        "tokens": step * BATCH * peer.length,
        "training_seconds": wall,
        "cores": used / wall,
        "bits_per_byte": judged(model, run, peer.length),
    }


@torch.no_grad()
def judged(model: GPT2LMHeadModel, run: Path, length: int) -> float:
    """Every held-out token but the first predicted once, in windows side by side."""
    config = load_run(run)
    stream = indexed_stream(config.data.valid[0].path, None, load_tokenizer(config.tokenizer))
    model.eval()
    tokens, total = torch.from_numpy(stream.tokens.astype(np.int64)), 0.0
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length + 1]
        logits = model(input_ids=window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert stream.num_bytes
    return bits_per_byte(total / (len(tokens) - 1), len(tokens) - 1, stream.num_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=KJV)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpt2", action="store_true", help="GPT-2's own size, too")
    parser.add_argument("--run", type=Path, help="what an earlier call of `castalia start` left, instead of a new one")
    results.option(parser)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as name:
        run = asked.run or Path(name) / "run"
        rows = [] if asked.run else [ours(asked.folder, run, asked.minutes, asked.threads)]
        model = load_run(run).model
        assert model is not None
        small = (model.num_layers, model.hidden_size, model.num_heads, load_run(run).data.seq_length)
        peers = [Peer("transformers, small", *small, RATE), Peer("transformers, small, tuned rate", *small, 20 * RATE)]
        if asked.gpt2:
            peers.append(Peer("transformers, GPT-2", 12, 768, 12, 1024, RATE))
        for row in chain(rows, (theirs(peer, run, asked.minutes) for peer in peers)):
            print(json.dumps(row), flush=True)
            spent = row["training_seconds"] * row["cores"]
            results.record(f"{row['name']}, 1,000 tokens", [1000 * spent / row["tokens"]], "cpu")


if __name__ == "__main__":
    main()
