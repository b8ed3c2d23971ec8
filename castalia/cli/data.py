"""`castalia data`: prepare corpora, look into them; `data_order.py` has the verbs on the order of training."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from castalia.cli.data_order import Json, TokenizerPath, batch, seen
from castalia.errors import DataError
from castalia.strict_json import to_json
from castalia.units import plural

if TYPE_CHECKING:
    import numpy as np

    from castalia.data.indexed import IndexedDataset
    from castalia.data.prepare import PreparationReport
    from castalia.data.tokenizer import Tokenizer

BAD_SHOWN = 10  # records that were left out, by message
app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def data() -> None:
    """Prepare corpora, look into them, show what a step trains on."""


@app.command()
def prepare(
    inputs: Annotated[
        list[str], typer.Argument(help="files, folders or URLs: jsonl, txt, gz, zst, zip, tar, parquet, arrow")
    ],
    output: Annotated[Path, typer.Option(help="writes OUTPUT_text_document.bin and .idx")],
    tokenizer: TokenizerPath = None,
    tokenizer_kind: Annotated[
        str | None, typer.Option(help="hf, gpt2, hf_gpt2, sentencepiece, neox_sentencepiece, tiktoken, char, bytes")
    ] = None,
    merges: Annotated[Path | None, typer.Option(help="merges.txt of GPT-2 BPE files")] = None,
    jsonl_keys: Annotated[
        str | None,
        typer.Option(
            help="fields to prepare, separated by commas; one corpus each; text|body: the one that a record has  "
            "[default: text]"
        ),
    ] = None,
    append_eod: Annotated[
        bool, typer.Option("--append-eod", help="end each document with the end-of-document id")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave out and count records that are not documents")
    ] = False,
    ftfy: Annotated[bool, typer.Option("--ftfy", help="repair broken Unicode first")] = False,
    num_docs: Annotated[int | None, typer.Option(help="stop after so many documents", min=1)] = None,
    mask_before_token: Annotated[
        str | None, typer.Option(help="ids a,b,c: also write labels without what precedes their first occurrence")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="the fields (default: conversation) hold lists of {role, content}: a Jinja file, or a tokenizer_config"
            ".json or folder with a template; also writes labels"
        ),
    ] = None,
    generation_role: Annotated[str, typer.Option(help="whose turns of a conversation are trained on")] = "assistant",
    only_last: Annotated[bool, typer.Option("--only-last", help="train on the conversation's last turn alone")] = False,
    reward_key: Annotated[
        str | None, typer.Option(help="field (true, false or a number) that judges a conversation; also writes rewards")
    ] = None,
    for_rm: Annotated[bool, typer.Option("--for-rm", help="reward models: only a last end-of-document counts")] = False,
    workers: Annotated[int | None, typer.Option(help="processes at a time; default: all cores", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Tokenize text into an indexed corpus: OUTPUT_text_document.bin and .idx.

    \b
    Examples:
      castalia data prepare texts.jsonl --tokenizer tokenizer.json --output corpus --append-eod
      castalia data prepare texts.jsonl --tokenizer-kind bytes --output corpus-bytes

    The files are the same for any number of workers. If the command is interrupted, run it again: it continues.
    """
    from castalia.bars import progress
    from castalia.cli.render import say
    from castalia.data.chat import Chat, read_template
    from castalia.data.prepare import Recipe
    from castalia.data.prepare import prepare as run
    from castalia.data.sources import BadRecord, MissingField

    chat = None
    if chat_template is not None:
        chat = Chat(*read_template(chat_template), role=generation_role, only_last=only_last, for_rm=for_rm)
    elif only_last or for_rm or reward_key:
        raise DataError("--only-last, --for-rm and --reward-key need --chat-template")
    keys = jsonl_keys or ("conversation" if chat else "text")
    recipe = Recipe(
        tokenizer=_tokenizer_config(tokenizer, tokenizer_kind, merges),
        keys=tuple(key.strip() for key in keys.split(",")),
        append_eod=append_eod,
        skip_bad=skip_bad,
        ftfy=ftfy,
        mask_before=_ids(mask_before_token),
        chat=chat,
        reward=reward_key,
    )
    start, shown = time.monotonic(), [0]  # bytes read at each call
    try:
        with progress(in_bytes=True) as advance:

            def show(report: PreparationReport) -> None:
                text = f"{plural(report.documents, 'document')}, {report.tokens:,} tokens"
                advance(report.done_bytes - shown[-1], text, report.total_bytes)
                shown.append(report.done_bytes)

            report = run(inputs, output, recipe, workers=workers, num_docs=num_docs, on_progress=show)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        raise
    except BadRecord as error:
        told = _fields_told(jsonl_keys) if isinstance(error, MissingField) else ""
        raise BadRecord(f"{error}{told}, or leave such records out with --skip-bad") from None
    seconds = time.monotonic() - start
    for message in report.bad[:BAD_SHOWN]:
        print(f"left out: {message}", file=sys.stderr)
    if len(report.bad) > BAD_SHOWN:
        print(f"left out: {len(report.bad) - BAD_SHOWN:,} more, which --json lists", file=sys.stderr)
    dropped = f", dropped {report.empty} empty" if report.empty else ""
    dropped += f", left out {len(report.bad)} bad" if report.bad else ""
    before = report.continued
    if before:
        print(f"continued after {before['documents']:,} documents of an interrupted run", file=sys.stderr)
    if as_json:
        print(to_json(asdict(report) | {"seconds": round(seconds, 3)}))
        return
    megabytes = (report.text_bytes - before.get("text_bytes", 0)) / 1e6  # of this start, as `seconds` are
    say(
        f"{', '.join(report.outputs)}: {plural(report.documents, 'document')}, {report.tokens:,} tokens{dropped}, "
        f"{megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)"
    )
    if report.engine:
        print(f"ids from {report.engine}")
    if report.note:
        say(f"note: {report.note}")
    if report.end:
        print(f"each {'conversation' if chat else 'document'} ends with id {report.end}")


def _fields_told(given: str | None) -> str:
    """The way out for a record without a field."""
    if given is None:
        return ", name its field with --jsonl-keys ('text|body': whichever of the two a record has)"
    several = given.replace(",", "|")
    return "" if several == given else f", take whichever field a record has: --jsonl-keys '{several}'"


@app.command()
def inspect(
    prefix: Annotated[Path, typer.Argument(help="the corpus: path of .bin and .idx without the ending")],
    tokenizer: TokenizerPath = None,
    as_json: Json = False,
) -> None:
    """Print a corpus's documents, tokens, lengths, dtype, largest id and how its first document begins.

    \b
    Examples:
      castalia data inspect corpus_text_document
      castalia data inspect corpus_text_document --tokenizer tokenizer.json
    """
    from castalia.cli.render import print_facts
    from castalia.data.corpora import describe
    from castalia.data.indexed import open_dataset

    corpus = open_dataset(prefix)
    facts = describe(corpus)
    first = corpus[0][:64].tolist() if len(corpus) else []
    facts["first_document"] = _load(tokenizer).decode(first) if tokenizer else first
    if as_json:
        print(to_json(facts, indent=2))
        return
    texts = {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in facts.items()}
    print_facts([(name.replace("_", " "), text) for name, text in texts.items() if name != "lengths"])
    print("length (tokens)        items")
    most = max((row["items"] for row in facts["lengths"]), default=1)
    for row in facts["lengths"]:
        print(f"{row['from']:>8,} to {row['to']:>8,} {row['items']:>9,} {'#' * round(40 * row['items'] / most)}")


@app.command()
def stats(
    prefixes: Annotated[list[Path], typer.Argument(metavar="PREFIX...")],
    plot: Annotated[Path | None, typer.Option(help="a picture of the lengths; default name: data-stats.png")] = None,
    as_json: Json = False,
) -> None:
    """Print lengths, tokens, largest id and duplicates of one or more corpora.

    \b
    Examples:
      castalia data stats corpus_text_document
      castalia data stats corpus_text_document --plot lengths.png
    """
    from castalia.cli.render import say
    from castalia.data.corpora import describe, duplicates
    from castalia.data.indexed import open_dataset
    from castalia.figures import check_picture

    check_picture(plot, "--plot")
    corpora = [open_dataset(prefix) for prefix in prefixes]
    rows = [describe(corpus) | {"duplicates": duplicates(corpus)} for corpus in corpora]
    if plot is not None:
        _plot_lengths({corpus.prefix: corpus.sizes for corpus in corpora}, plot)
    if as_json:
        print(to_json(rows, indent=2))
        return
    for row in rows:
        counts = ", ".join(f"{row[name]:,} {name}" for name in ("documents", "tokens", "duplicates"))
        lengths = f"lengths {row['shortest']:,} to {row['longest']:,}"
        say(f"{row['prefix']}: {counts}, {lengths}, largest id {row['largest_id']}")


def _plot_lengths(sizes: dict[str, np.ndarray], file: Path) -> None:
    import numpy as np

    from castalia.figures import panels, write_picture

    longest = max((int(lengths.max()) for lengths in sizes.values() if len(lengths)), default=1)
    figure, (axes,) = panels(size=(6.4, 4.8))
    for name, lengths in sizes.items():
        # At least 2 for the last edge: bins need a width even where every item has one token.
        axes.hist(lengths, bins=np.geomspace(1, max(2, longest), 40).tolist(), histtype="step", label=name)
    axes.set(xscale="log", xlabel="tokens", ylabel="items")
    axes.legend()
    write_picture(figure, file)


@app.command()
def merge(
    prefixes: Annotated[list[Path], typer.Argument(metavar="PREFIX...")],
    output: Annotated[Path, typer.Option(help="prefix of the corpus to write")],
    as_json: Json = False,
) -> None:
    """Write several corpora, one after the other, as one.

    \b
    Examples:
      castalia data merge corpus_text_document corpus_text_document --output twice
      castalia data merge a_text_document b_text_document --output both
    """
    from castalia.data.corpora import merge as run

    _say_written([run(prefixes, output)], as_json)


@app.command()
def split(
    prefix: Annotated[Path, typer.Argument(help="the corpus to split")],
    output: Annotated[Path, typer.Option(help="writes OUTPUT_train, OUTPUT_valid and OUTPUT_test")],
    weights: Annotated[str, typer.Option(help="shares of the three")] = "969, 30, 1",
    by: Annotated[
        Literal["hash", "order"], typer.Option(help="hash: some documents of each file; order: the last ones")
    ] = "hash",
    as_json: Json = False,
) -> None:
    """Write shares of a corpus for training, validation and test as corpora of their own.

    \b
    Examples:
      castalia data split corpus_text_document --output parts
      castalia data split corpus_text_document --output parts --weights 90,5,5 --by order

    The documents of each are chosen as data.holdout in a config chooses them; `order` is its `contiguous`.
    """
    from castalia.data.corpora import split as run

    _say_written(run(prefix, weights, output, by), as_json)


@app.command()
def index(
    files: Annotated[list[Path], typer.Argument(help="files of ids without a header: OLMo's .npy, nanoGPT's .bin")],
    output: Annotated[Path, typer.Option(help="a folder: FILE becomes OUTPUT/FILE.idx and .bin, a link to it")],
    tokenizer: TokenizerPath = None,
    eod: Annotated[int | None, typer.Option(help="the id that ends documents; default: the tokenizer's")] = None,
    dtype: Annotated[
        Literal["uint16", "uint32"] | None,
        typer.Option(help="of the ids; default: by the size of the vocabulary"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make corpora of published token files, which stay as they are.

    \b
    Examples:
      castalia data index part-0-00000.npy --tokenizer tokenizer.json --output tokens
      castalia data index part-0-00000.npy --eod 0 --dtype uint16 --output tokens

    In a config: data.path=tokens/part-0-00000, or a list in data.train.
    """
    from castalia.bars import progress
    from castalia.data.token_files import index_tokens, token_file_dtype

    words = _load(tokenizer) if tokenizer else None
    if words is None and (eod is None or dtype is None):
        raise DataError(
            "a tokenizer says where documents end, and which ids there are: --tokenizer, or --eod and --dtype"
        )
    ends = words.eod_id if eod is None and words else eod
    if ends is None:
        raise DataError(f"--tokenizer {tokenizer} has no end-of-document token: give its id with --eod")
    kind = dtype or token_file_dtype(words.vocab_size if words else 0)
    if len({file.stem for file in files}) < len(files):
        raise DataError("two of the files have one name; index each folder into an --output of its own")
    with progress(sum(file.stat().st_size for file in files if file.is_file()), in_bytes=True) as advance:
        made = [
            index_tokens(file, output / file.stem, kind, ends, words.vocab_size if words else None, advance)
            for file in files
        ]
    _say_written(made, as_json)


def _say_written(corpora: list[IndexedDataset], as_json: bool) -> None:
    """The corpora that were written: an array of objects, or a line for each."""
    counts = [(each.prefix, len(each.doc_index) - 1, len(each.tokens)) for each in corpora]
    if as_json:
        print(to_json([dict(zip(("prefix", "documents", "tokens"), row, strict=True)) for row in counts], indent=2))
        return
    for prefix, documents, tokens in counts:
        print(f"{prefix}: {plural(documents, 'document')}, {tokens:,} tokens")


app.command()(batch)
app.command()(seen)


def _ids(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise DataError(f"--mask-before-token {text}: expected token ids such as 50,12,7") from None


def _tokenizer_config(path: Path | None, kind: str | None = None, merges: Path | None = None):
    import pydantic

    from castalia.config.schema import TokenizerConfig

    if path is None and kind is None:
        raise DataError(
            "no tokenizer: give --tokenizer FILE, which `castalia tokenizer train` makes, or --tokenizer-kind bytes"
        )
    try:
        return TokenizerConfig(kind=kind, path=str(path) if path else None, merges=str(merges) if merges else None)  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        raise DataError(f"--tokenizer-kind {kind}: {error.errors()[0]['msg']}") from None


def _load(path: Path) -> Tokenizer:
    from castalia.data.tokenizer import load_tokenizer

    return load_tokenizer(_tokenizer_config(path))
