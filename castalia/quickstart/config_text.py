"""The config of a quick start: each value with its reason."""

from __future__ import annotations

from typing import NamedTuple

from castalia.config.commented import Settings
from castalia.quickstart.choose import Choice
from castalia.quickstart.family import architecture, rate_groups
from castalia.quickstart.measured import BASE_WIDTH, SOURCE

SAVE_MINUTES = 10.0  # from one checkpoint to the next
EVALUATIONS = 10  # in a run
EVALUATED_SHARE = 0.15  # of the tokens trained on: all evaluations, which cost a third of training each
WARMUP = 0.05


class Places(NamedTuple):
    """Where things lie: the run's folder, the tokenizer's file and the prefixes of two corpora."""

    run: str
    tokenizer: str
    train: str
    valid: str


def settings(choice: Choice, places: Places, valid_tokens: int, steps: int, step_seconds: float) -> Settings:
    """All that the config says. `steps` and `step_seconds` are of the whole run and of one step, as measured."""
    batch_tokens = choice.batch_size * choice.length
    evaluated = max(1, min(valid_tokens // batch_tokens, int(EVALUATED_SHARE * steps / EVALUATIONS)))
    model = architecture(choice.layers, choice.width, choice.vocab_size, choice.length)
    del model["vocab_size"], model["max_positions"]  # the tokenizer's, and data.seq_length
    reasons = {
        "num_layers": "blocks one after the other",
        "hidden_size": "numbers that stand for a token between the blocks",
        "num_heads": f"of {choice.width // model['num_heads']} numbers each",
        "mlp_size": "8/3 of hidden_size, a multiple of 64",
        "norm": "from here on Llama's architecture: other programs can read it",
    }
    found: Settings = {f"model.{name}": (value, reasons.get(name, "")) for name, value in model.items()}
    rate = f"of vectors; for batch, width and depth from one measured rate: {SOURCE}"
    return found | {
        "data.train": (places.train, "the text as tokens"),
        "data.valid": (places.valid, "text that the model never learns from: it judges it"),
        "data.seq_length": (choice.length, "tokens that the model sees at once"),
        "tokenizer.path": (places.tokenizer, "learned from the text"),
        "optimizer.lr": (choice.rate, rate),
        "optimizer.groups": (rate_groups(choice.width), f"muP: matrices learn at {BASE_WIDTH} / width of that rate"),
        "optimizer.betas": ([0.9, 0.95], ""),
        "optimizer.weight_decay": (0.1, ""),
        "schedule.style": ("linear", "from the full rate down to nothing at the last step"),
        "schedule.warmup": (WARMUP, "share of the steps in which the rate rises"),
        "train.steps": (steps, f"what fits into the time at {step_seconds:.3g} s a step; more time: raise it"),
        "train.batch_size": (choice.batch_size, f"sequences of a step: {batch_tokens:,} tokens"),
        "train.micro_batch_size": (choice.micro_batch_size, "sequences at once: lower it where memory is short"),
        "eval.every": (max(1, steps // EVALUATIONS), "steps between looks at text that it never learns from"),
        "eval.batches": (evaluated, ""),
        "checkpoint.dir": (places.run, "the run's folder"),
        "checkpoint.save_minutes": (SAVE_MINUTES, "so much is lost at most; the next save replaces such a one"),
        "log.every": (max(1, min(steps // 20, round(60 / step_seconds))), "steps between lines on the screen"),
    }
