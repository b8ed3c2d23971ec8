"""What tuning changed: the loss on what was held out, answers to a few of its questions, and the adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from castalia.bars import unseen
from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import WriteOptions
from castalia.checkpoint.formats.native.save import BEST, best_step
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import architecture, load_tokenizer_for
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.objective import needs_reference
from castalia.config.schema import RunConfig
from castalia.data.chat import chat_of
from castalia.data.pairs import open_samples
from castalia.data.tokenizer import Tokenizer
from castalia.errors import CheckpointError, DataError
from castalia.evaluate.perplexity import evaluate
from castalia.finetuning.lessons import Example, examples
from castalia.generate.dialogue import opening, prompt_ids, turn_ends
from castalia.generate.generation import generate
from castalia.loading import build_model
from castalia.model.transformer import Transformer
from castalia.parallel.executor import Executor
from castalia.train.hardware import choose_device, choose_dtype
from castalia.train.preference import PreferenceLoss

ROWS = 8  # documents at a time
SHOWN = ("loss", "perplexity", "accuracy", "margin")


@dataclass(frozen=True)
class Look:
    """One model: its figures on the held-out data, and its texts after the prompts."""

    scores: dict[str, float]  # empty without held-out data, and for what the model cannot do
    texts: list[str]


def look(
    checkpoint: Checkpoint, config: RunConfig, prompts: Sequence[list[int]], max_tokens: int, tokenizer: Tokenizer
) -> Look:
    """The figures of a model on the validation data of `config`, and the texts that it writes after the prompts."""
    known = config.model.vocab_size if config.model else None
    if known and architecture(checkpoint).padded_vocab_size < known:  # before tokens were added
        return Look({}, [])
    device = choose_device(config.train.device)
    model = build_model(checkpoint, device, choose_dtype(config.precision.compute, device))
    scores = held_out_scores(model, config)
    if model.cfg.reward_head or not prompts:
        return Look(scores, [])
    try:
        stop = turn_ends(chat_of(tokenizer), tokenizer)
    except DataError:  # no template, as texts need none
        stop = ()
    return Look(scores, generate(model, tokenizer, list(prompts), max_tokens=max_tokens, stop=stop))


def held_out_scores(model: Transformer, config: RunConfig) -> dict[str, float]:
    """Loss and perplexity of the answers, or loss, accuracy and margin of preferences; each document counts once."""
    objective = config.train.objective
    if not config.data.valid or model.cfg.reward_head != (objective == "reward"):
        return {}
    data = open_samples(config.with_({"eval.batches": None}), "valid")
    executor = Executor(model, ROWS)
    if objective == "causal":
        scores = evaluate(executor, data.whole_pass(ROWS))
    else:
        batches = data.whole_pass(ROWS, ROWS if objective == "kto" else 1)
        scores = PreferenceLoss(config, executor, _reference(model, config), 1).evaluate(batches)
    return {name: scores[name] for name in SHOWN if name in scores}


def _reference(model: Transformer, config: RunConfig) -> Executor | None:
    """The reference model, where its log-probabilities are not stored with the data."""
    if not needs_reference(config):
        return None
    checkpoint = open_checkpoint(str(config.preference.reference or config.checkpoint.init_from))
    weights = next(model.parameters())
    return Executor(build_model(checkpoint, weights.device, weights.dtype), ROWS)


def models_of(model: str, folder: Path) -> dict[str, Checkpoint]:
    """The models that are compared, by name: before, after, and the best one where it is another one than the last."""
    after = open_checkpoint(folder)
    models = {"before": open_checkpoint(model), f"after step {after.progress.step}": after}
    best = best_step(folder / "checkpoints")
    if best is not None and best != after.progress.step:
        models[f"best, step {best}"] = open_checkpoint(folder / "checkpoints" / BEST)
    return models


def compare(
    model: str, folder: Path, config: RunConfig, prompt: str | None, max_tokens: int
) -> tuple[dict[str, Look], list[Example], Tokenizer]:
    """A look at each model, the examples that they continue, and the tokenizer that reads these.

    `prompt` takes the place of the examples' own: a question for a model that has a template, else a text.
    """
    models = models_of(model, folder)
    tokenizer = load_tokenizer_for(list(models.values())[1])  # of the tuned one, which may have tokens more
    shown = list(examples(config.data.valid or config.data.train, 2))
    if prompt is not None:
        shown = [Example(_asked(prompt, config, tokenizer), [])]
    if config.train.objective == "reward":
        shown = []
    looks = {
        name: look(each, config, [example.prompt for example in shown], max_tokens, tokenizer)
        for name, each in models.items()
    }
    return looks, shown, tokenizer


def _asked(prompt: str, config: RunConfig, tokenizer: Tokenizer) -> list[int]:
    if tokenizer.folder.template is None or not all(source.labels for source in config.data.train):
        return tokenizer.encode(prompt)
    return prompt_ids(opening(prompt, None), chat_of(tokenizer), tokenizer)


def plan_adapters(run: Path) -> Callable[[], Path]:
    """What writes a run's adapters in PEFT's layout and returns their folder: those of the best state, if it is kept.

    Raises CheckpointError where no Hugging Face class computes the model; so does the call where it cannot write.
    """
    best, target = run / "checkpoints" / BEST, run / "adapter"
    checkpoint, options = open_checkpoint(best if best.is_dir() else run, adapters=True), WriteOptions()
    plan = convert.plan_files("peft", checkpoint, options)
    mark = convert.identity(checkpoint, options, plan)

    def write() -> Path:
        try:
            convert.write(plan, target, mark, unseen, force=True)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; the run is complete, and `castalia convert {run} OUT --to peft` writes its adapters"
            ) from error
        return target

    return write
