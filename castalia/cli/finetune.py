"""`castalia finetune`: a model taught by a file of texts or conversations, with a sample before and after."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from castalia.checkpoint.tensors import Checkpoint
    from castalia.config.schema import RunConfig, Source, TokenizerConfig
    from castalia.data.chat import Chat
    from castalia.data.tokenizer_folder import TokenizerFolder

CONVERSATION = ("messages", "conversation", "conversations")  # fields that hold a list of {role, content}
LONGEST = 512  # tokens of a sample, where the model can take more
BATCH = 8
ASKED = "data/asked.yml"  # of a run: what the command asked for, of which the data beside it were made
# Where neither the command line nor the model has a template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_CKPT", help="a run, or a checkpoint of any format")],
    configs: Annotated[
        list[str],
        typer.Argument(metavar="data.train=FILE [CONFIG...] [KEY=VALUE...]", help="FILE: jsonl, txt, ...; or a corpus"),
    ],
    lora: Annotated[int | None, typer.Option(min=1, help="rank of the adapters  [default: 16]")] = None,
    full: Annotated[bool, typer.Option("--full", help="train all weights instead of adapters")] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, or folder with one; default: the model's, else `role: content`")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="of the sample; default: how the first record begins")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="of the sample")] = 40,
    nproc: Annotated[int | None, typer.Option(min=1, help="start so many processes, without samples")] = None,
) -> None:
    """Fine-tune a model on texts ({"text": ...}) or conversations ({"messages": [{"role": ..., "content": ...}]}).

    \b
    Examples:
      castalia finetune runs/first data.train=chats.jsonl train.steps=5 checkpoint.dir=runs/tuned
      castalia finetune runs/first data.train=texts.jsonl train.steps=5 checkpoint.dir=runs/full --full

    Architecture and tokenizer come from the checkpoint. The run's folder gets the config, finetune.yml, and the data.
    """
    from castalia.checkpoint.adapters import adapters_of
    from castalia.checkpoint.opener import open_checkpoint
    from castalia.cli.train import split_words, train
    from castalia.config.load import dump_config, load_config
    from castalia.config.yaml_files import mapping_from
    from castalia.errors import ConfigError
    from castalia.files import write_text
    from castalia.train.run_folder import refuse_second_start, run_folder

    if full and lora:
        raise ConfigError("--full and --lora exclude each other; keep one")
    files, words = split_words(configs)
    source = open_checkpoint(model, adapters=True)
    if full and adapters_of(source):
        raise ConfigError(f"--full: {source.path} has adapters; merge them first: castalia merge-lora {model} OUT")
    usual = defaults(model, source, None if full else lora or 16)
    config = load_config([usual, *files], words)
    if not any(path.startswith("tokenizer.") and by != "NeoX default" for path, by in config.origins.items()):
        usual["tokenizer"] = own_tokenizer(source).model_dump()
        config = load_config([usual, *files], words)
    folder = run_folder(config)
    asked = f"{dump_config(config)}# chat template: {chat_template}\n"
    begun = has_begun(folder, asked)
    if not begun:
        refuse_second_start(folder)
    prepared = prepare(config, source, folder / "data", chat_template, begun)
    write_text(folder / ASKED, asked)
    corpora = {
        name: [each.model_dump(exclude_defaults=True) for each in sources_of_split]
        for name, sources_of_split in prepared.sources.items()
    }
    rest = [word for word in words if word.partition("=")[0] not in ("data.train", "data.valid")]
    chosen, fitting, data = (mapping_from(keys, "its default") for keys in (usual, prepared.fitting, {"data": corpora}))
    config = load_config([chosen, fitting, *files, data], rest)
    if config.train.epochs and prepared.conversations:
        steps = math.ceil(config.train.epochs * prepared.conversations / (config.train.batch_size or BATCH))
        config = config.with_({"train.steps": steps, "train.epochs": None})
    write_text(folder / "finetune.yml", dump_config(config))
    if nproc and nproc > 1:
        from castalia.parallel.launcher import relaunch

        relaunch(nproc, ["train", str(folder / "finetune.yml")])
    question = prepared.prompt if prompt is None else prompt
    before = sample(model, question, max_tokens, config.tokenizer)
    train(config)
    if config.finetune.lora or adapters_of(source):
        save_adapters(folder)
    print(f"\nbefore  {question}{before}\n\nafter   {question}{sample(str(folder), question, max_tokens)}")


def has_begun(folder: Path, asked: str) -> bool:
    """Whether this very command began the run in the folder, in a job that starts it again."""
    from castalia.config.load import load_config
    from castalia.train.run_folder import is_run, this_job, was_started_by

    files = folder / ASKED, folder / "finetune.yml"
    if not is_run(folder) or not all(file.is_file() for file in files) or files[0].read_text("utf-8") != asked:
        return False
    return was_started_by(this_job(None, load_config(files[1])), folder)


def defaults(model: str, source: Checkpoint, rank: int | None) -> dict[str, Any]:
    """What suits most models; every key can be given otherwise."""
    from castalia.checkpoint.adapters import adapters_of

    longest = source.config.model.max_positions if source.config and source.config.model else None
    lora = None if rank is None or adapters_of(source) else {"rank": rank}
    name = Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2]
    return {
        "checkpoint": {"init_from": model, "dir": f"runs/{name}-{'lora' if rank else 'full'}"},
        "finetune": {"lora": lora} if lora else {},
        "data": {"seq_length": min(longest or LONGEST, LONGEST)},
        "optimizer": {"lr": 2e-4 if rank else 2e-5, "weight_decay": 0.0},
        "schedule": {"warmup": 0.03},
        "train": {"epochs": 3, "batch_size": BATCH},
    }


def own_tokenizer(source: Checkpoint) -> TokenizerConfig:
    """That of the checkpoint."""
    from castalia.checkpoint.description import tokenizer_settings
    from castalia.errors import ConfigError

    words = tokenizer_settings(source)
    if words is None or not (words.path or words.kind):
        raise ConfigError(f"{source.path} names no tokenizer; give tokenizer.path")
    return words


class Prepared(NamedTuple):
    """Data made ready for fine-tuning, and the sizes that suit them."""

    sources: dict[str, tuple[Source, ...]]  # of data.train and data.valid, files replaced by corpora
    fitting: dict[str, Any]  # sizes of samples and batches that suit so much data
    prompt: str  # how the first record begins
    conversations: int  # of data.train, each a sample


def prepare(config: RunConfig, source: Checkpoint, folder: Path, template: Path | None, done: bool = False) -> Prepared:
    """Turns files of text or conversations into corpora in the folder, where they are already if it is `done`.

    Sources that are corpora stay as they are.
    """
    from castalia.checkpoint.description import model_folder
    from castalia.config.schema import TokenizerConfig
    from castalia.data.indexed import open_dataset
    from castalia.data.prepare import Recipe
    from castalia.data.prepare import prepare as run
    from castalia.data.tokenizer import add_tokens, load_tokenizer
    from castalia.errors import ConfigError, DataError

    if not config.data.train:
        raise ConfigError("what is it to learn? Give data.train=FILE, a jsonl with a text or messages in each line")
    tokenizer = load_tokenizer(config.tokenizer, neox=config.neox_exact, model=model_folder(source))
    if config.finetune.add_tokens:
        add_tokens(tokenizer, config.finetune.add_tokens)
    tokenizer.save(folder / "tokenizer")
    sources: dict[str, tuple[Source, ...]] = {}
    prompts: list[str] = []
    fitting: dict[str, Any] = {}
    conversations = 0
    for split in ("train", "valid"):
        sources_of_split = []
        for number, each in enumerate(getattr(config.data, split)):
            if Path(each.path).is_file():
                record = first_record(Path(each.path))
                key = next((name for name in CONVERSATION if name in record), "text")
                chat = None if key == "text" else read_chat(template, tokenizer.folder)
                eod = chat is None and tokenizer.eod_id is not None
                recipe = Recipe(TokenizerConfig(path=str(folder / "tokenizer")), (key,), append_eod=eod, chat=chat)
                prefix = f"{folder / split}{number}"
                if not done:
                    report = run([each.path], prefix, recipe)
                    print(f"prepared      {each.path}: {report.documents:,} documents, {report.tokens:,} tokens")
                prompts.append(beginning(record, key, chat))
                corpus = f"{prefix}_{key}_document"
                conversations += len(open_dataset(corpus)) if chat and split == "train" else 0
                fitting = fitting or sizes_for(config, corpus, chat is not None)
                labels = f"{prefix}_{key}_label_document" if chat else None
                each = each.with_({"path": corpus, "labels": labels})
            elif not Path(f"{each.path}.idx").is_file():
                path = each.path
                raise DataError(f"{path}: neither a text file nor the prefix of a corpus ({path}.bin and {path}.idx)")
            sources_of_split.append(each)
        sources[split] = tuple(sources_of_split)
    return Prepared(sources, fitting, prompts[0] if prompts else "", conversations)


def sizes_for(config: RunConfig, corpus: str, chat: bool) -> dict[str, Any]:
    """A conversation is a sample, as long as the longest; texts follow one another. Few samples make a small batch."""
    from castalia.data.indexed import open_dataset

    sizes, longest = open_dataset(corpus).sizes, config.data.seq_length
    if chat:
        length = min(longest, int(sizes.max()))
        return {"data": {"packing": "unpacked", "seq_length": length}, "train": {"batch_size": min(BATCH, len(sizes))}}
    length = min(longest, max(1, int(sizes.sum()) - 1))
    batch = min(BATCH, max(1, int(sizes.sum()) // (4 * length)))
    return {"data": {"mask_documents": True, "seq_length": length}, "train": {"batch_size": batch}}


def first_record(path: Path) -> dict[str, Any]:
    """The first JSON object of a file; of other files their beginning as a text. DataError for anything else."""
    from castalia.data.sources import chunks
    from castalia.errors import DataError
    from castalia.reading import plain_json

    chunk = next(chunks([path]), None)
    records = (chunk.records or tuple(chunk.lines.split(b"\n"))) if chunk else ()
    record = next((record for record in records if record.strip()), b"")
    if chunk and not chunk.is_json:
        return {"text": record.decode("utf-8", errors="replace")}
    try:
        value = plain_json(record)
    except ValueError as error:
        raise DataError(f"{path}:1: not JSON: {error}") from error
    if not isinstance(value, dict) or not value.keys() & {"text", *CONVERSATION}:
        keys = ", ".join(value) if isinstance(value, dict) else f"a {type(value).__name__}"
        raise DataError(
            f"{path}:1: neither a text nor a conversation, but {keys}; each line is to be "
            '{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'
        )
    return value


def read_chat(template: Path | None, words: TokenizerFolder) -> Chat:
    """The template that was asked for, else the one beside the model's tokenizer, else a plain one."""
    from castalia.data.chat import Chat, read_template

    if template is not None:
        return Chat(*read_template(template))
    if words.template is not None:
        return Chat(words.template, tuple(words.special.items()))
    print("note: the model has no chat template; turns are written as `role: content` (--chat-template)")
    return Chat(PLAIN_TEMPLATE)


def beginning(record: dict[str, Any], key: str, chat: Chat | None) -> str:
    """A prompt: what comes before the first answer, or a few words of a text."""
    from castalia.data.chat import renderer
    from castalia.data.record_forms import turns

    if chat is None:
        return " ".join(str(record[key]).split(" ")[:6])
    messages = turns(record[key], key)
    asked = next(number for number, turn in enumerate(messages) if turn["role"] == chat.role)
    return renderer(chat)(messages[:asked], True).text


def sample(path: str, prompt: str, max_tokens: int, tokenizer: TokenizerConfig | None = None) -> str:
    """What the model writes after the prompt, always taking the likeliest token. `tokenizer`: instead of its own."""
    from castalia.checkpoint.opener import open_checkpoint
    from castalia.checkpoint.restore import load_tokenizer_for
    from castalia.data.tokenizer import load_tokenizer
    from castalia.generate.generation import generate
    from castalia.loading import build_model
    from castalia.train.hardware import choose_device, choose_dtype

    checkpoint = open_checkpoint(path)
    device = choose_device("auto")
    model = build_model(checkpoint, device, choose_dtype("auto" if device.type == "cuda" else "fp32", device))
    words = load_tokenizer(tokenizer) if tokenizer else load_tokenizer_for(checkpoint)
    begins = prompt.startswith(words.folder.special.get("bos_token") or "\0")  # as templates spell it out
    (ids,) = words.encode_batch([prompt], bare=begins)
    return generate(model, words, [ids], max_tokens=max_tokens)[0]


def save_adapters(run: Path) -> None:
    """Beside the checkpoints, in PEFT's layout, where a Hugging Face class computes the model."""
    from castalia.checkpoint import convert
    from castalia.checkpoint.file_plan import WriteOptions
    from castalia.checkpoint.opener import open_checkpoint
    from castalia.errors import CheckpointError

    checkpoint, options = open_checkpoint(run, adapters=True), WriteOptions()
    try:
        plan = convert.plan_files("peft", checkpoint, options)
    except CheckpointError as error:
        print(f"note: the adapters are not written in PEFT's layout: {error}")
        return
    mark = convert.identity(checkpoint, options, plan)
    convert.write(plan, run / "adapter", mark, lambda count: None, force=True)
    print(f"adapters in PEFT's layout: {run / 'adapter'}")
