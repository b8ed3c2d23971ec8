"""The tokenizer's files beside converted weights: ours, or those that `AutoTokenizer` opens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from castalia.checkpoint.load import load_tokenizer_for
from castalia.checkpoint.tensors import Checkpoint
from castalia.checkpoint.writing import Output, bytes_output, json_output
from castalia.config.schema import Tokenizer as TokenizerSettings
from castalia.data.tokenizer import PADDING, RustTokenizer, SentencePieceTokenizer, Tokenizer, engine_text
from castalia.errors import CastaliaError

# What a tokenizer of `transformers` consists of. Such files are copied as they are, templates included.
HF_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def our_tokenizer(checkpoint: Checkpoint) -> tuple[list[Output], tuple[str, ...]]:
    """Files in `tokenizer/`, as a run has them, and what to say where there are none."""
    tokenizer, notes = _load(checkpoint)
    return _saved(tokenizer, "tokenizer/") if tokenizer else [], notes


def written_tokenizer(checkpoint: Checkpoint, outputs: Sequence[Output], folder: Path | None) -> TokenizerSettings:
    """The settings of the tokenizer whose files `our_tokenizer` gave, in `folder`; without files, the source's."""
    assert checkpoint.config is not None
    names = {Path(output.name).name: str(Path(folder or "", output.name)) for output in outputs}
    if "tokenizer.json" in names:
        return TokenizerSettings(kind="hf", path=names["tokenizer.json"])
    if "vocab.json" in names:
        return TokenizerSettings(kind="gpt2", path=names["vocab.json"], merges=names["merges.txt"])
    if "tokenizer.model" in names:
        return TokenizerSettings(kind="sentencepiece", path=names["tokenizer.model"])
    return checkpoint.config.tokenizer  # names an encoding, or is missing, as was said


def hf_tokenizer(checkpoint: Checkpoint) -> tuple[list[Output], int | None, tuple[str, ...]]:
    """Files that `AutoTokenizer` opens, the id that ends a document, and what to say where there are none."""
    tokenizer, notes = _load(checkpoint)
    if tokenizer is None:
        return [], None, notes
    if folder := _hf_folder(checkpoint):
        return (
            [bytes_output(name, (folder / name).read_bytes()) for name in HF_FILES if (folder / name).is_file()],
            (tokenizer.eod_id),
            (),
        )
    if isinstance(tokenizer, RustTokenizer):
        config, special = _hf_settings(tokenizer, checkpoint)
        file = tokenizer.files.get("tokenizer.json")
        files = [bytes_output("tokenizer.json", file.read_bytes() if file else engine_text(tokenizer.engine))]
        files += [json_output("tokenizer_config.json", config), json_output("special_tokens_map.json", special)]
        return files, tokenizer.eod_id, ()
    if isinstance(tokenizer, SentencePieceTokenizer):
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False}
        files = [*_saved(tokenizer, ""), json_output("tokenizer_config.json", config)]
        return files, tokenizer.eod_id, ()
    kind = type(tokenizer).__name__
    return [], tokenizer.eod_id, (f"no tokenizer files are written: transformers has nothing like our {kind}",)


def _load(checkpoint: Checkpoint) -> tuple[Tokenizer | None, tuple[str, ...]]:
    try:
        return load_tokenizer_for(checkpoint), ()
    except CastaliaError as error:
        return None, (f"no tokenizer files are written ({error}); name the tokenizer with --tokenizer",)


def _saved(tokenizer: Tokenizer, prefix: str) -> list[Output]:
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return [bytes_output(prefix + file.name, file.read_bytes()) for file in sorted(Path(folder).iterdir())]


def _hf_folder(checkpoint: Checkpoint) -> Path | None:
    """The folder of a tokenizer that `transformers` saved."""
    path = checkpoint.config.tokenizer.path if checkpoint.config else None
    folder = Path(path or "")
    folder = folder if folder.is_dir() else folder.parent
    return folder if path and (folder / "tokenizer_config.json").is_file() else None


def _hf_settings(tokenizer: RustTokenizer, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, str | None]]:
    """tokenizer_config.json and special_tokens_map.json. Batches are padded with the end of text if need be."""
    special: dict[str, str | None] = {}
    if tokenizer.eod_id is not None:
        end = tokenizer.engine.id_to_token(tokenizer.eod_id)
        known = tokenizer.engine.token_to_id(PADDING)
        rows = checkpoint.model["embed.weight"].shape[0]
        padding = PADDING if known is not None and known < rows else end
        special = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": padding}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
    }
    model = checkpoint.config.model if checkpoint.config else None
    if model and model.max_positions:
        config["model_max_length"] = model.max_positions
    return config, special
