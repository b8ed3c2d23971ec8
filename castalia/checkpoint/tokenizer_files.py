"""The tokenizer's files of a converted checkpoint: in our layout, or in the one that `AutoTokenizer` opens.

Files that the source has are copied byte for byte, and those that it lacks are generated. One is changed: a
tokenizer_config.json that only transformers 5 opens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from castalia.checkpoint.description import model_folder, tokenizer_settings
from castalia.checkpoint.file_plan import OutputFile, bytes_output, json_output, json_text
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import TokenizerConfig
from castalia.data.tokenizer import (
    PADDING,
    ByteTokenizer,
    RustTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    engine_text,
)
from castalia.data.tokenizer_folder import GENERATION, MODEL, SPECIAL, TokenizerFolder, read_tokenizer_folder
from castalia.data.tokenizer_folder import SETTINGS as HF_SETTINGS
from castalia.errors import CastaliaError

if TYPE_CHECKING:
    import tokenizers

FOLDER = "tokenizer"  # of a run, or of a converted checkpoint
FAST = "PreTrainedTokenizerFast"
# What 5 gives a model. 4 adds token_type_ids, which Llama's `generate` refuses, and GPT-2 takes for words.
INPUTS = ["input_ids", "attention_mask"]
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# transformers 4 lets settings say whether the texts of these begin and end with special tokens, 5 the tokenizer.json.
ENDS_IN_SETTINGS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer")


def our_tokenizer(checkpoint: Checkpoint) -> tuple[list[OutputFile], tuple[str, ...]]:
    """The files in `tokenizer/`, as a run has them, and notes for the user where the tokenizer is missing."""
    tokenizer, notes = _load(checkpoint)
    files = _saved(tokenizer) if tokenizer else dict(_source_folder(checkpoint).files)
    return [bytes_output(f"{FOLDER}/{name}", data) for name, data in sorted(files.items())], notes


def megatron_tokenizer(checkpoint: Checkpoint) -> tuple[list[OutputFile], tuple[str, ...]]:
    """The files of `our_tokenizer` with the settings by which Megatron's `AutoTokenizer` knows the end of documents."""
    outputs, notes = our_tokenizer(checkpoint)
    tokenizer, _ = _load(checkpoint)
    settings = f"{FOLDER}/{HF_SETTINGS}"
    if any(output.name == settings for output in outputs):
        source = tokenizer.folder if tokenizer else _source_folder(checkpoint)
        opened = bytes_output(settings, _opened_by_all(source, tokenizer)[HF_SETTINGS])
        return [opened if output.name == settings else output for output in outputs], notes
    if tokenizer is None or any(output.name == f"{FOLDER}/vocab.json" for output in outputs):
        return outputs, notes
    if isinstance(tokenizer, RustTokenizer):
        made = _hf_settings(tokenizer, checkpoint)[0]
    elif isinstance(tokenizer, SentencePieceTokenizer):
        made = _sentencepiece_settings(tokenizer)
    else:
        return outputs, (*notes, _nothing_like(tokenizer))
    return [*outputs, json_output(settings, made)], notes


def written_tokenizer(checkpoint: Checkpoint, outputs: Sequence[OutputFile], folder: Path | None) -> TokenizerConfig:
    """The settings of the tokenizer whose files `our_tokenizer` returned, when they lie in `folder`.

    Tokenizers without files keep their kind; a tokenizer that is missing keeps the source's settings.
    """
    assert checkpoint.config is not None
    names = {Path(output.name).name: str(Path(folder or "", output.name)) for output in outputs}
    if "tokenizer.json" in names:
        return TokenizerConfig(kind="hf", path=names["tokenizer.json"])
    if "vocab.json" in names:
        return TokenizerConfig(kind="gpt2", path=names["vocab.json"], merges=names["merges.txt"])
    if "tokenizer.model" in names:
        return TokenizerConfig(kind="sentencepiece", path=names["tokenizer.model"])
    tokenizer, _ = _load(checkpoint)
    if isinstance(tokenizer, ByteTokenizer):
        return TokenizerConfig(kind=tokenizer.kind)  # type: ignore[arg-type]
    if isinstance(tokenizer, TiktokenTokenizer):
        return TokenizerConfig(kind="tiktoken", path=tokenizer.engine.name)
    return checkpoint.config.tokenizer  # the tokenizer is missing, which a note has said


def hf_tokenizer(checkpoint: Checkpoint) -> tuple[list[OutputFile], dict[str, Any], tuple[str, ...]]:
    """The files that `AutoTokenizer` opens, the token ids for config.json, and notes where there are no files."""
    tokenizer, notes = _load(checkpoint)
    source = tokenizer.folder if tokenizer else _source_folder(checkpoint)
    ids = dict(source.token_ids) or _token_ids(tokenizer)
    files = {name: data for name, data in _opened_by_all(source, tokenizer).items() if name != MODEL}
    outputs = [bytes_output(name, data) for name, data in files.items()]
    if GENERATION not in files:
        outputs.append(json_output(GENERATION, {"_from_model_config": True, **ids}))
    if tokenizer is None or HF_SETTINGS in files:
        return outputs, ids, notes
    if isinstance(tokenizer, RustTokenizer):
        config, special = _hf_settings(tokenizer, checkpoint)
        made = [json_output(HF_SETTINGS, config)]
        made += [json_output(SPECIAL, special)] if SPECIAL not in files else []
        if "tokenizer.json" not in files:
            made.append(bytes_output("tokenizer.json", engine_text(tokenizer.engine)))
        return outputs + made, ids, ()
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [*outputs, json_output(HF_SETTINGS, _sentencepiece_settings(tokenizer))], ids, ()
    return outputs, ids, (_nothing_like(tokenizer),)


def _opened_by_all(source: TokenizerFolder, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """The files of a folder, with a tokenizer_config.json that transformers 4 and 5 read as the same tokenizer."""
    engine = tokenizer.engine if isinstance(tokenizer, RustTokenizer) else None
    settings = readable_settings(source.settings, engine)
    changed = {} if settings == source.settings else {HF_SETTINGS: json_text(settings).encode()}
    return {**source.files, **changed}


def readable_settings(settings: Mapping[str, Any], engine: tokenizers.Tokenizer | None) -> dict[str, Any]:
    """The content of a tokenizer_config.json as both transformers 4 and 5 read it, whichever has written it.

    5 renamed the class of tokenizers that are a tokenizer.json alone, and changed what these give a model. It lists
    under `extra_special_tokens`, where 4 has the tokens that only some models name, what 4 lists under
    `additional_special_tokens`. And only the tokenizer.json says whether texts begin and end with special tokens. What
    4 wrote, 5 reads as well. `engine` is the tokenizer.json; None: there is none.
    """
    given, extra = dict(settings), settings.get("extra_special_tokens")
    if given.get("tokenizer_class") in ("TokenizersBackend", FAST):
        given["tokenizer_class"] = FAST
        given.setdefault("model_input_names", INPUTS)
    if isinstance(extra, list):
        del given["extra_special_tokens"]
        if extra:
            given["additional_special_tokens"] = [*(given.get("additional_special_tokens") or ()), *extra]
    if given.get("backend") != "tokenizers":  # transformers 4 wrote it
        return given
    named = {name: text for name, text in given.items() if name.endswith("_token") and name not in NAMED}
    if texts := {name: text for name, text in named.items() if isinstance(text, str)}:
        given["extra_special_tokens"] = texts
    if engine is not None and given.get("tokenizer_class") in ENDS_IN_SETTINGS:
        whole, bare = (engine.encode("a", add_special_tokens=added).ids for added in (True, False))
        given["add_bos_token"], given["add_eos_token"] = whole[:1] != bare[:1], whole[-1:] != bare[-1:]
    return given


def _nothing_like(tokenizer: Tokenizer) -> str:
    return f"no tokenizer files are written: transformers has nothing like {tokenizer.kind}"


def _load(checkpoint: Checkpoint) -> tuple[Tokenizer | None, tuple[str, ...]]:
    try:
        return load_tokenizer_for(checkpoint), ()
    except CastaliaError as error:
        return None, (f"no tokenizer files are written ({error}); name the tokenizer with --tokenizer",)


def _source_folder(checkpoint: Checkpoint) -> TokenizerFolder:
    """What the source's files say of the tokenizer where it cannot be loaded."""
    settings = tokenizer_settings(checkpoint)
    folder = Path(settings.path) if settings and settings.path else model_folder(checkpoint)
    return read_tokenizer_folder({}, folder if folder and folder.is_dir() else model_folder(checkpoint))


def _saved(tokenizer: Tokenizer) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids for config.json where the source's files name none."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    begin = tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id
    return {"bos_token_id": begin, "eos_token_id": tokenizer.eod_id}


def _sentencepiece_settings(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id, "unk_token": tokenizer.engine.unk_id()}
    special = {name: tokenizer.token(index) for name, index in ids.items() if index is not None}
    begins = {"add_bos_token": not tokenizer.neox and tokenizer.bos_id is not None}
    return {"tokenizer_class": "LlamaTokenizer", "legacy": False, **begins, **special}


def _hf_settings(tokenizer: RustTokenizer, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, str | None]]:
    """tokenizer_config.json and special_tokens_map.json. Without a padding token, end of text pads batches."""
    special: dict[str, str | None] = {}
    if tokenizer.eod_id is not None:
        end = tokenizer.engine.id_to_token(tokenizer.eod_id)
        known = tokenizer.engine.token_to_id(PADDING)
        rows = checkpoint.model["embed.weight"].shape[0]
        # A padding token must have a row in the embedding.
        padding = PADDING if known is not None and known < rows else end
        special = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": padding}
    special |= tokenizer.folder.special
    config: dict[str, Any] = {
        "tokenizer_class": FAST,
        "clean_up_tokenization_spaces": False,
        "model_input_names": INPUTS,
        **special,
    }
    model = checkpoint.config.model if checkpoint.config else None
    if model and model.max_positions:
        config["model_max_length"] = model.max_positions
    return config, special
