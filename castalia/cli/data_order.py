"""`castalia data batch` and `data seen`: what each step trains on, and which steps train on a text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.errors import DataError
from castalia.strict_json import to_json
from castalia.units import plural
from castalia.wrapping import WIDTH

if TYPE_CHECKING:
    from castalia.config.schema import RunConfig
    from castalia.data.loader import Samples
    from castalia.data.pairs import Pairs
    from castalia.data.published_rows import ParquetRows, ShardedRows
    from castalia.data.seen import Sightings
    from castalia.data.tokenizer import Tokenizer

TokenizerPath = Annotated[Path | None, typer.Option("--tokenizer", help="tokenizer.json, vocab.json, .model or folder")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
OPEN_END = 10**18  # of `--steps 9..`
SHOWN_PLACES = 20
SHOWN_TEXT = 60  # characters
Words = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN|CONFIG... [key=value ...]",
        help="a run, or files or presets and overrides; or published rows: shards name-00000-of-00020.bin or Parquet",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="sequences of a step of published rows")]


def batch(
    config: Words,
    step: Annotated[int | None, typer.Option(help="counted from 1, as in metrics.jsonl; default: 1", min=1)] = None,
    steps: Annotated[str | None, typer.Option(help="several steps, as 1..4,9")] = None,
    split: Annotated[str, typer.Option(help="train, valid or test")] = "train",
    output: Annotated[Path | None, typer.Option(help="write the rows to this .jsonl, .csv or .parquet")] = None,
    npy: Annotated[Path | None, typer.Option(help="write the ids, [batch, tokens + 1], to this file")] = None,
    tokenizer: TokenizerPath = None,
    batch_size: BatchSize = 1024,
    as_json: Json = False,
) -> None:
    """Show exactly which documents and tokens a step trains on.

    \b
    Examples:
      castalia data batch runs/first --step 3
      castalia data batch run.yml --steps 1..4 --output rows.jsonl

    Tokens are decoded if the config names a tokenizer. Those that count for the loss are bright, the rest dim; without
    a terminal they stand in [[double brackets]].
    """
    from castalia.data.row_files import check_row_file

    if output is not None:
        check_row_file(output)
    chosen = _chosen(step, steps)
    published = _published(config, batch_size)
    if published is None:
        _show_run(config, chosen, split, tokenizer, output, npy, as_json)
    elif npy is not None or split != "train":
        raise DataError(f"{config[0]} holds rows of training alone, which --output writes")
    else:
        _show_published(published, chosen, tokenizer, output, as_json)


def _chosen(step: int | None, steps: str | None) -> list[range]:
    """The steps asked for, counted from 0."""
    from castalia.series.members import parse_steps

    if step is not None and steps is not None:
        raise DataError("give --step or --steps, not both")
    if steps is None:
        return [range((step or 1) - 1, step or 1)]
    ranges = parse_steps(steps)
    if any(first < 1 or last < first for first, last in ranges):
        raise DataError(f"--steps {steps}: steps are counted from 1, and a range A..B rises")
    return [range(first - 1, last) for first, last in ranges]


def _published(words: list[str], batch_size: int) -> ShardedRows | ParquetRows | None:
    from castalia.data.published_rows import open_published

    if len(words) != 1 or (Path(words[0]) / "config.yml").is_file():
        return None
    return open_published(words[0], batch_size)


def _show_run(
    words: list[str],
    chosen: list[range],
    split: str,
    tokenizer: Path | None,
    output: Path | None,
    npy: Path | None,
    as_json: bool,
) -> None:
    from castalia.cli.train import read_config
    from castalia.data.batch_rows import batch_rows, table_rows, write_ids
    from castalia.data.loader import SPLITS
    from castalia.data.pairs import open_samples

    run = read_config(words)
    name = next((each for each in SPLITS if each == split), None)
    if name is None:
        raise DataError(f"--split {split} is none of {', '.join(SPLITS)}")
    numbers = [number for steps in chosen for number in _within(steps, run, name)]
    samples, decoder = open_samples(run, name), _decoder(tokenizer, run)
    if npy is not None:
        if len(numbers) > 1:
            raise DataError("--npy holds the ids of one step; --output holds those of several")
        write_ids(samples, numbers[0], npy)
    if output is not None:
        _write(output, (table_rows(samples, number, decoder) for number in numbers), as_json)
        return
    for number in numbers:
        rows = batch_rows(samples, number, decoder)
        if as_json:
            facts = {"step": number + 1, "split": split, "fingerprint": samples.fingerprint, "samples": rows}
            print(to_json(facts))
        else:
            _show_rows(number + 1, rows, decoder)


def _within(steps: range, run: RunConfig, split: str) -> range:
    """The steps, those of an open range up to the run's last. Raises DataError for steps that the run does not have."""
    last = run.train.steps if split == "train" else None
    if last is None:
        if steps.stop >= OPEN_END:
            raise DataError("--steps: the length of the run is unknown; give the last step")
        return steps
    stop = min(steps.stop, last) if steps.stop >= OPEN_END else steps.stop
    if stop > last or not len(range(steps.start, stop)):
        option, step = "--step" if len(steps) == 1 else "--steps", min(steps.stop, max(steps.start + 1, stop))
        raise DataError(f"{option} {step}: the run's steps are 1 to {last} (train.steps)")
    return range(steps.start, stop)


def _decoder(tokenizer: Path | None, run: RunConfig | None = None) -> Tokenizer | None:
    """The tokenizer of the option, else of the config; None if neither names one."""
    from castalia.config.schema import TokenizerConfig
    from castalia.data.tokenizer import load_tokenizer

    if tokenizer is not None:
        return load_tokenizer(TokenizerConfig(path=str(tokenizer)))
    if run is None or (run.tokenizer.path is None and run.tokenizer.kind is None):
        return None
    return load_tokenizer(run.tokenizer, neox=run.neox_exact)


def _write(output: Path, blocks: Iterable[Sequence[Mapping[str, Any]]], as_json: bool) -> None:
    from castalia.data.row_files import write_rows

    rows = write_rows(output, blocks)
    print(to_json({"output": str(output), "rows": rows}) if as_json else f"wrote {output}: {plural(rows, 'row')}")


def _show_rows(step: int, rows: list[dict[str, Any]], decoder: Tokenizer | None) -> None:
    for number, row in enumerate(rows):
        what = f", {row['side']}" if "side" in row else f", reward {row['reward']:g}" if "reward" in row else ""
        print(f"--- step {step}, sequence {number}: position {row['position']} of the data order{what}")
        if "intervention" in row:
            print(f"    {row['intervention']} by data.intervene")
        for piece in row["pieces"]:
            print(f"    {piece['prefix']} document {piece['document']}, tokens {piece['start']} to {piece['stop'] - 1}")
        masked = sum(label < 0 for label in row["labels"])
        print(f"    {len(row['labels']) - masked} of {len(row['labels'])} labels count for the loss")
        end = sum(piece["stop"] - piece["start"] for piece in row["pieces"])  # what follows fills up
        end = len(row["tokens"]) if row.get("intervention") == "replaced" else end
        _show_trained(row["tokens"][:end], row["labels"][:end], decoder)


def _show_published(
    source: ShardedRows | ParquetRows, chosen: list[range], tokenizer: Path | None, output: Path | None, as_json: bool
) -> None:
    from castalia.data.batch_rows import published_rows

    if any(steps.stop >= OPEN_END for steps in chosen):
        raise DataError("--steps: give the last step; how many there are, files that are not here may say")
    decoder = _decoder(tokenizer)
    blocks = (block for steps in chosen for block in published_rows(source, steps, decoder))
    if output is not None:
        _write(output, blocks, as_json)
        return
    for row in (row for block in blocks for row in block):
        if as_json:
            print(to_json(row))
            continue
        print(f"--- step {row['step']}, sequence {row['row']}: row {row['position']}")
        print(row["text"] if decoder else " ".join(map(str, row["ids"])))


def seen(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[TEXT] RUN|CONFIG... [key=value ...]", help="the text, then what `data batch` takes"),
    ],
    file: Annotated[Path | None, typer.Option(help="many texts in place of TEXT: jsonl, txt, parquet")] = None,
    key: Annotated[str, typer.Option(help="the field of the texts in --file")] = "text",
    tokenizer: TokenizerPath = None,
    batch_size: BatchSize = 1024,
    as_json: Json = False,
) -> None:
    """Find every place at which a run trains on a text, in the order of training.

    \b
    Examples:
      castalia data seen "the first" runs/first
      castalia data seen --file texts.txt run.yml --json

    The corpus is read once from beginning to end. A text is found within a document, whatever stands beside it. A text
    that is cut where a sequence ends is counted apart, and is no place.
    """
    from castalia.bars import progress
    from castalia.data.seen import bytes_to_read, seen_in_rows, seen_in_run

    texts, rest = _texts(words, file, key)
    published = _published(rest, batch_size)
    if published is not None:
        decoder, total = _decoder(tokenizer), published.bytes_here
        if decoder is None:
            raise DataError(f"{rest[0]} says no tokenizer: name it with --tokenizer")
        with progress(total, in_bytes=True, shown=not as_json) as advance:
            all_sightings = seen_in_rows(published, texts, decoder, advance)
        for name in published.missing:
            print(f"note: {name} is not here, and was not searched", file=sys.stderr)
    else:
        run, samples, steps = _opened(rest)
        decoder = _decoder(tokenizer, run)
        if decoder is None:
            raise DataError("the config names no tokenizer: give --tokenizer or tokenizer.path=FILE")
        with progress(bytes_to_read(samples, steps), in_bytes=True, shown=not as_json) as advance:
            all_sightings = seen_in_run(samples, steps, texts, decoder, advance)
    if as_json:
        print(to_json([_as_json(sightings) for sightings in all_sightings], indent=1))
        return
    for sightings in all_sightings:
        _show_sightings(sightings)


def _texts(words: list[str], file: Path | None, key: str) -> tuple[list[str], list[str]]:
    """The texts to find, and what is left of the words."""
    from castalia.data.sources import documents

    if file is None and len(words) < 2:
        raise DataError("give the text and a run or a config; or many texts in --file")
    texts, rest = (words[:1], words[1:]) if file is None else (list(documents([file], key)), words)
    if not texts or not all(texts):
        raise DataError(f"{'the text' if file is None else f'a text of {file}'} is empty: nothing to find")
    return texts, rest


def _opened(words: list[str]) -> tuple[RunConfig, Samples | Pairs, int]:
    """The config, the training data and the number of steps."""
    from castalia.cli.train import read_config
    from castalia.data.pairs import open_samples

    run = read_config(words)
    samples = open_samples(run)
    steps = run.train.steps or samples.steps(run.train.epochs or 1)
    return run, samples, steps


def _as_json(sightings: Sightings) -> dict[str, Any]:
    return {
        "text": sightings.text,
        "times": len(sightings.places),
        "steps": len({place.step for place in sightings.places}),
        "cut": sightings.cut,
        "anywhere": sightings.anywhere,
        "places": [place._asdict() | {"first": number == 0} for number, place in enumerate(sightings.places)],
    }


def _show_sightings(sightings: Sightings) -> None:
    from castalia.cli.render import print_table, say

    places, text = sightings.places, _shortened(sightings.text)
    first = f", first in step {places[0].step}" if places else ""
    say(f"{text}: seen {plural(len(places), 'time')}{first}")
    if places:
        rows = [
            [
                "first" if number == 0 else "again",
                str(place.step),
                str(place.row),
                str(place.offset),
                str(place.tokens),
                place.prefix if place.document is None else f"{place.prefix} document {place.document}",
            ]
            for number, place in enumerate(places[:SHOWN_PLACES])
        ]
        print_table("places", ["sight", "step", "row", "offset", "tokens", "where"], rows)
    if len(places) > SHOWN_PLACES:
        print(f"{len(places) - SHOWN_PLACES:,} more: --json has all")
    if sightings.cut:
        say(f"{plural(sightings.cut, 'time')} more a sequence ends within it, so that no sequence holds all of it")
    if not sightings.anywhere:
        say("its ids depend on what stands beside it: found only where they are those of the text alone")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= SHOWN_TEXT else f"{text[: SHOWN_TEXT - 3]}...")


def _show_trained(tokens: list[int], labels: list[int], tokenizer: Tokenizer | None) -> None:
    """The sequence with what the loss counts bright and the rest dim; marked [[...]] where there is no terminal.

    A label stands at the token before it, so token t is trained on if labels[t - 1] counts.
    """
    from itertools import groupby

    from rich.console import Console
    from rich.text import Text

    from castalia.data.tokenizer import decode_with_special

    console, line = Console(), Text()  # not markup: a corpus may hold [brackets]
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    learned = [False, *(label >= 0 for label in labels)]  # nothing predicts the first token
    ids = [*tokens, labels[-1]] if labels[-1] >= 0 else tokens  # the last label is not an input
    for counts, run in groupby(zip(ids, learned, strict=False), key=lambda pair: pair[1]):
        part = [token for token, _ in run]
        text = decode_with_special(tokenizer, part) if tokenizer else " ".join(map(str, part)) + " "
        if console.is_terminal:
            line.append(text, "bold green" if counts else "dim")
        else:
            line.append(f"[[{text}]]" if counts else text)
    console.print(line, highlight=False)
