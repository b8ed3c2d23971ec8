"""Preparing a corpus side by side: ours, Hugging Face's `tokenizers` in batches, and a loop that encodes one by one.

    python benchmarks/prepare.py [--tokenizer FILE_OR_FOLDER ...] [--megabytes 40] [--english JSONL] [--rounds 5]
                                 [--workers N] [--quick]

The text is real: the King James Bible that is shipped with the examples, or a file with more, and the Python sources of
the standard library and the installed packages.
Each side runs in a process of its own, in turn, reads the same jsonl and must write the same `.bin` and `.idx` byte for
byte. The loop is what GPT-NeoX's preprocess_data does for each document, without its imports and progress lines.
Figures are medians: MB of text per second while preparing, and per second of CPU, threads and worker processes
included; what a side takes for a single document, most of it reading the tokenizer, is its start. Without --tokenizer
one is trained on the text; a folder with vocab.json and merges.txt is GPT-2 BPE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import results

from castalia.config.schema import TokenizerConfig
from castalia.data.dataset_writer import DatasetWriter, token_dtype
from castalia.data.prepare import Recipe, prepare
from castalia.data.tokenizer import load_tokenizer, train_bpe

BATCH_DOCUMENTS = 512
KJV = Path(__file__).parents[1] / "examples" / "kjv" / "kjv.jsonl"


def ours(source: Path, output: Path, tokenizer: TokenizerConfig, workers: int | None) -> None:
    prepare([source], output, Recipe(tokenizer, append_eod=True), workers=workers)


def batches(source: Path, output: Path, config: TokenizerConfig, workers: int | None) -> None:
    """`encode_batch_fast` on all cores, the rest as plain as it gets."""
    tokenizer = load_tokenizer(config)
    with (
        DatasetWriter(f"{output}_text_document", token_dtype(tokenizer.vocab_size)) as writer,
        source.open("rb") as lines,
    ):
        while texts := [json.loads(line)["text"] for line in islice(lines, BATCH_DOCUMENTS)]:
            rows = [np.array([*ids, tokenizer.eod_id], writer.dtype) for ids in tokenizer.encode_batch(texts)]
            writer.add_many(np.concatenate(rows), [len(row) for row in rows])


def loop(source: Path, output: Path, config: TokenizerConfig, workers: int | None) -> None:
    """One document after the other, as the original's tool does with one worker."""
    tokenizer = load_tokenizer(config)
    with (
        DatasetWriter(f"{output}_text_document", token_dtype(tokenizer.vocab_size)) as writer,
        source.open("rb") as lines,
    ):
        for line in lines:
            writer.add(np.array([*tokenizer.encode(json.loads(line)["text"]), tokenizer.eod_id], writer.dtype))


SIDES = {"ours": ours, "tokenizers, batches": batches, "one by one": loop}


def python_sources() -> Iterator[str]:
    """Of the standard library, then of the installed packages."""
    paths = sysconfig.get_paths()
    standard = [path for path in sorted(Path(paths["stdlib"]).rglob("*.py")) if "site-packages" not in path.parts]
    for path in [*standard, *sorted(Path(paths["purelib"]).rglob("*.py"))]:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # some test files are of other encodings on purpose


def write_text(path: Path, texts: Iterator[str], megabytes: float) -> float:
    """Documents up to so many MB; returns the MB that there were."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in filter(None, texts):
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written > megabytes * 1e6:
                break
    return written / 1e6


def measure(side: str, source: Path, output: Path, tokenizer: Path, workers: int | None) -> tuple[float, float, str]:
    """Seconds, CPU seconds and a digest of the files, from a process of its own."""
    words = [sys.executable, __file__, "--side", side, "--source", source, "--output", output, "--tokenizer", tokenizer]
    words += ["--workers", workers] if workers else []
    done = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
    digest = hashlib.sha256()
    for ending in (".bin", ".idx"):
        digest.update(Path(f"{output}_text_document{ending}").read_bytes())
    seconds, cpu = map(float, done.stdout.split())
    return seconds, cpu, digest.hexdigest()


def run_side(side: str, source: Path, output: Path, tokenizer: Path, workers: int | None) -> None:
    begin, config = time.perf_counter(), TokenizerConfig(path=str(tokenizer))
    before = os.times()
    SIDES[side](source, output, config, workers)
    after = os.times()
    cpu = sum(after[:4]) - sum(before[:4])  # user and system, of this process and of its workers
    print(time.perf_counter() - begin, cpu)


def compare(name: str, source: Path, megabytes: float, tokenizer: Path, rounds: int, workers: int | None) -> None:
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in SIDES}
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        single = Path(folder) / "single.jsonl"
        with source.open("rb") as lines:
            single.write_bytes(next(lines))
        for _ in range(rounds):
            for number, side in enumerate(SIDES):
                output = Path(folder) / f"{number}"
                start = measure(side, single, output, tokenizer, workers)
                seconds, cpu, digest = measure(side, source, output, tokenizer, workers)
                found[side].append((seconds, cpu, start[1]))
                digests.add(digest)
    assert len(digests) == 1, "the sides wrote different files"
    print(f"{name}, {megabytes:.1f} MB, {tokenizer.name}, median of {rounds}, same files:")
    rates = {}
    for side, rows in found.items():
        seconds, cpu, start = map(statistics.median, zip(*rows, strict=True))
        results.record(f"{name}, {tokenizer.name}, {side}", [row[1] for row in rows], "cpu")
        rates[side] = megabytes / cpu, megabytes / (cpu - start)
        print(
            f"  {side:20} {megabytes / seconds:6.1f} MB/s; per CPU-second {rates[side][0]:6.1f} MB, "
            f"{rates[side][1]:6.1f} MB after the start of {start:.2f} s"
        )
    for side in list(SIDES)[1:]:
        whole, later = (mine / other for mine, other in zip(rates["ours"], rates[side], strict=True))
        print(f"  ours over a core of '{side}': {whole:.1f}x, {later:.1f}x after the start (target 20x)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, action="append", default=[])
    parser.add_argument("--megabytes", type=float, default=40.0, help="at most, of each kind of text")
    parser.add_argument("--english", type=Path, default=KJV, help="lines with a text each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="of ours; all cores if left out")
    parser.add_argument("--quick", action="store_true", help="1 MB of each, one round")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    results.option(parser)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, options.source, options.output, options.tokenizer[0], options.workers)
        return
    megabytes, rounds = (1.0, 1) if options.quick else (options.megabytes, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        sources = {"English": map(_text, options.english.open(encoding="utf-8")), "code": python_sources()}
        paths = {name: Path(folder) / f"{name}.jsonl" for name in sources}
        sizes = {name: write_text(paths[name], texts, megabytes) for name, texts in sources.items()}
        if not options.tokenizer:
            texts = (_text(line) for path in paths.values() for line in path.open(encoding="utf-8"))
            options.tokenizer = [Path(folder) / "trained"]
            train_bpe(texts, 2_000 if options.quick else 16_000).save(options.tokenizer[0])
        for tokenizer in options.tokenizer:
            for name, path in paths.items():
                compare(name, path, sizes[name], tokenizer, rounds, options.workers)


def _text(line: str) -> str:
    return json.loads(line)["text"]


if __name__ == "__main__":
    main()
