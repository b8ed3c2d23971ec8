"""`castalia score`: what a reward model thinks of texts, or how likely a language model finds them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.cli.streaming import MemoryOption
from castalia.strict_json import to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from castalia.checkpoint.tensors import Checkpoint
    from castalia.evaluate.record_batches import Record
    from castalia.parallel.executor import Executor


def command(
    model: Annotated[str, typer.Argument(metavar="REWARD_OR_MODEL", help="a run, or a checkpoint of any format")],
    file: Annotated[Path, typer.Option(help="jsonl of texts, conversations, prompts with answers, or pairs")],
    output: Annotated[Path | None, typer.Option(help="jsonl of the records with their scores; default: print")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="of conversations: Jinja file, or folder with one; default: the model's")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer file, where the checkpoint has none")] = None,
    step: Annotated[int | None, typer.Option(help="which of several checkpoints; default: the latest")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts that are judged at a time")] = 8,
    memory: MemoryOption = None,
) -> None:
    """Score texts with a reward model, or by their log-probability with a language model.

    \b
    Examples:
      castalia score runs/first --file texts.jsonl --output scores.jsonl
      castalia score runs/chat --file chats.jsonl

    Reward models add `score` to a record, language models `logprob` and `tokens`, which are those of the answers where
    there are some. For pairs, each name begins with chosen_ or rejected_.
    """
    from castalia.checkpoint.restore import architecture, load_tokenizer_for
    from castalia.cli.opening import open_and_tell, tell
    from castalia.cli.streaming import memory_bytes
    from castalia.evaluate.record_batches import answers_encoder, read_records, rewards_encoder, template_note
    from castalia.evaluate.scores import score_records
    from castalia.files import write_text

    checkpoint = open_and_tell(model, step=step)
    words = load_tokenizer_for(checkpoint, tokenizer)
    encoder = rewards_encoder if architecture(checkpoint).reward_head else answers_encoder
    records = read_records(file, encoder(words, chat_template))
    if note := template_note(records, words, chat_template):
        tell([note], str(file))
    executor = streamed_judge(checkpoint, records, batch_size, memory_bytes(memory)) or load_judge(
        checkpoint, batch_size
    )
    lines = [to_json(line, ensure_ascii=False) for line in score_records(executor, records, executor.micro_batch_size)]
    if output is None:
        print("\n".join(lines))
        return
    write_text(output, "\n".join(lines) + "\n")
    print(f"{output}: scores of {len(records):,} records by {checkpoint.path}")


def streamed_judge(checkpoint: Checkpoint, records: Sequence[Record], rows: int, memory: int | None) -> Executor | None:
    """The model with one block at a time in memory, if `memory` is given or it does not fit, which is told."""
    from castalia.cli.streaming import tell_streaming
    from castalia.plan.stream_plan import EvaluationShape
    from castalia.streaming.open_streamed import streamed_executor
    from castalia.train.hardware import choose_device, choose_dtype

    device, lengths = choose_device("auto"), [len(each.ids) for record in records for each in record.documents]
    shape = EvaluationShape(max([2, *lengths]), rows, max(rows, len(lengths)), False)
    dtype = choose_dtype("fp32" if device.type == "cpu" else "auto", device)
    executor = streamed_executor(checkpoint, shape, dtype, device, memory, True)
    if executor:
        tell_streaming(executor.model, f"batches of {executor.micro_batch_size} texts", "a pass")
    return executor


def load_judge(checkpoint: Any, rows: int) -> Executor:
    """The model on this process, in fp32 on CPUs, for `rows` texts at a time."""
    from castalia.checkpoint.restore import require_finite
    from castalia.loading import build_model
    from castalia.parallel.executor import Executor
    from castalia.train.hardware import choose_device, choose_dtype

    device = choose_device("auto")
    model = build_model(checkpoint, device, choose_dtype("fp32" if device.type == "cpu" else "auto", device))
    require_finite(dict(model.named_parameters()), checkpoint.path)
    return Executor(model, rows)


def best_texts(
    judge: str, prompts: Sequence[str], texts: Sequence[str], system: str | None, chat: bool
) -> list[tuple[int, float]]:
    """Of the texts of each prompt, which follow one another, the place of the one with the highest reward, and that.

    Raises ConfigError if the judge is no reward model.
    """
    import numpy as np

    from castalia.checkpoint.restore import load_tokenizer_for
    from castalia.cli.opening import open_and_tell
    from castalia.data.record_forms import Passage, Talk
    from castalia.errors import ConfigError
    from castalia.evaluate.record_batches import rewards_encoder
    from castalia.evaluate.scores import score_documents
    from castalia.generate.dialogue import opening

    checkpoint = open_and_tell(judge)
    executor = load_judge(checkpoint, 8)
    if not executor.models[0].cfg.reward_head:
        raise ConfigError(f"--judge {judge} is no reward model: it predicts tokens and judges no texts")
    encode = rewards_encoder(load_tokenizer_for(checkpoint), None)
    number = len(texts) // len(prompts)
    answers = [
        Talk([*opening(prompts[place // number], system), {"role": "assistant", "content": text}])
        if chat
        else Passage(prompts[place // number], text)
        for place, text in enumerate(texts)
    ]
    rewards = score_documents(executor, list(map(encode, answers)), 8).reshape(-1, number)
    return [(int(row.argmax()) + first * number, float(row.max())) for first, row in enumerate(np.asarray(rewards))]
