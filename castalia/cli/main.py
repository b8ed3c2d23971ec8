"""The `castalia` command. Each verb lives in a file of its own that is imported only when that verb is used."""

from __future__ import annotations

import io
import logging
import os
import platform
import sys
from importlib import import_module
from typing import Annotated

import typer

from castalia import __version__
from castalia.cli.habits import refuse_habits
from castalia.cli.pictures import name_pictures
from castalia.errors import CastaliaError, Stopped, out_of_memory
from castalia.wrapping import WIDTH, wrapped

# verb -> (module, one line of help). The module defines `command`, a plain function, or `app`, a typer.Typer.
VERBS = {
    "start": ("castalia.cli.start", "From a folder of text to a trained model, in the time that you have."),
    "train": ("castalia.cli.train", "Train, fine-tune or resume a run."),
    "finetune": ("castalia.cli.finetune", "Tune a model on texts, conversations or preferences: LoRA, or all weights."),
    "merge-lora": ("castalia.cli.merge_lora", "Merge LoRA adapters into their model."),
    "replay": ("castalia.cli.replay", "Compute one step of a run again, with norms of all layers and its data."),
    "lr-find": ("castalia.cli.lr_find", "Try rising learning rates and suggest one."),
    "eval": ("castalia.cli.evaluate", "Loss, perplexity and bits per byte of a checkpoint; tasks of lm-eval."),
    "lm-eval": ("castalia.cli.lm_eval", "Call lm-eval itself, with checkpoints of any format."),
    "score": ("castalia.cli.score", "Score texts with a reward model, or by their log-probability."),
    "generate": ("castalia.cli.generate", "Write text with a checkpoint."),
    "chat": ("castalia.cli.chat", "Talk with a model in the terminal, by its chat template."),
    "serve": ("castalia.cli.serve", "Serve checkpoints: OpenAI's interface, and a page to watch and compare them."),
    "data": ("castalia.cli.data", "Prepare corpora, inspect them, show what a step trains on."),
    "tokenizer": ("castalia.cli.tokenizer", "Train a tokenizer."),
    "config": ("castalia.cli.config", "Show, check, explain or convert configs."),
    "launch": ("castalia.cli.launch", "Make a script that starts a run on many machines."),
    "plan": ("castalia.cli.plan", "Parameters, memory, time and disk of a config, before it runs."),
    "inspect": ("castalia.cli.inspect", "Show what is inside a checkpoint of any format."),
    "activations": ("castalia.cli.activations", "Write the residual stream of texts at chosen layers."),
    "convert": ("castalia.cli.convert", "Write a checkpoint in another format, optimizer state included."),
    "average": ("castalia.cli.average", "The average of checkpoints, as a checkpoint."),
    "diff": ("castalia.cli.diff", "Compare two checkpoints of any formats."),
    "series": ("castalia.cli.series", "Check, measure and evaluate the checkpoints of many steps at once."),
    "mup": ("castalia.cli.mup", "Check that learning rates carry over from one width to another."),
    "status": ("castalia.cli.status", "Where runs stand: step, time left, loss, last save; alive or not."),
    "report": ("castalia.cli.report", "How good a run is: figures, samples, what to do next; as text and as a page."),
    "plot": ("castalia.cli.plot", "Draw curves of one or more runs."),
    "doctor": ("castalia.cli.doctor", "What this machine offers, and what each missing fast path costs."),
}


COMPLETING = "_CASTALIA_COMPLETE"  # set by the scripts of --install-completion and --show-completion


def build(chosen: str | None) -> typer.Typer:
    """The whole command line. Only the chosen verb is imported; the others are names with a line of help."""
    app = typer.Typer(
        rich_markup_mode=None,  # which would take [brackets] for markup
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": WIDTH},
    )
    app.callback()(_castalia)
    for verb, (module_name, line) in VERBS.items():
        if verb != chosen:
            app.command(verb, help=line, short_help=line)(_not_chosen)
            continue
        module = import_module(module_name)
        if hasattr(module, "app"):
            for command in module.app.registered_commands:  # in lists whole, not cut after so many characters
                command.short_help = " ".join((command.callback.__doc__ or "").partition("\n\n")[0].split())
            app.add_typer(module.app, name=verb, help=line)
        else:
            app.command(verb, context_settings=getattr(module, "CONTEXT", None))(module.command)
    return app


def _print_version(asked: bool) -> None:
    """The version, and what decides most about bits and speed beside it."""
    if asked:
        import torch

        from castalia.train.hardware import choose_device, machine_name

        print(f"castalia {__version__}")
        print(f"torch {torch.__version__} on {machine_name(choose_device('auto'))}; Python {platform.python_version()}")
        raise typer.Exit


def _castalia(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Versions and the device.", callback=_print_version)
    ] = False,
) -> None:
    """Train, inspect, convert, evaluate and run GPT-style language models on plain PyTorch."""


def _not_chosen() -> None:
    raise AssertionError("only the chosen verb can run")


def growing_segments() -> None:
    """Lets torch's CUDA allocator grow its segments, so that steps of many sizes leave no holes. Before its import.

    What the user gave under any of the names that torch reads stays as it is.
    """
    if not any(f"PYTORCH_{kind}ALLOC_CONF" in os.environ for kind in ("", "CUDA_", "HIP_")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def keep_all_characters() -> None:
    """Terminals and pipes that are not UTF-8 get a question mark for what they cannot show, and no traceback.

    Bytes that are not UTF-8 come in as lone surrogates, which are refused where text is expected, and go out as bytes.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "replace")


class Warnings(logging.Handler):
    """What modules warn of, on standard error, wrapped as other warnings are. Of a machine's processes one speaks."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning, or an error of a server, which may have a traceback."""
        if record.levelno > logging.WARNING:
            print(self.format(record), file=sys.stderr, flush=True)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print(wrapped(f"warning: {record.getMessage()}"), file=sys.stderr, flush=True)


def main() -> None:
    """Run the verb of `sys.argv`.

    Exit codes: 0 when done; 1 when the reader of a pipe has gone, or when a check found something; 2 for what the user
    can mend; 128 and the signal's number when one ended it, a run having been saved. A launcher that was not told would
    start its processes again for that, so that they end with 0; it says 128 and the number itself where it was told.
    """
    growing_segments()
    keep_all_characters()
    logging.getLogger("castalia").handlers = [Warnings(logging.WARNING)]
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a warning of a lost connection is a C++ stack of 20 lines
    typed = sys.argv[1:]
    if COMPLETING in os.environ:  # the shell asks how a command goes on, which it gives in a variable
        typed = os.environ.get("_TYPER_COMPLETE_ARGS", os.environ.get("COMP_WORDS", "")).split()[1:]
    verb = next((word for word in typed if not word.startswith("-")), None)
    try:
        try:
            refuse_habits(sys.argv[1:], list(VERBS))
            sys.argv[1:] = name_pictures(sys.argv[1:])
            build(verb)()
        finally:
            sys.stdout.flush()
    except Stopped as stop:  # which the run has said
        sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + stop.signal)
    except CastaliaError as error:
        sys.exit(_report(str(error)))
    except BrokenPipeError:
        # `castalia ... | head`: the reader has gone. What is still buffered goes nowhere, so that Python ends quietly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 1)  # a launcher would start its processes again
    except (MemoryError, RuntimeError, ImportError) as error:  # the last two of libraries, for many reasons
        if not (message := out_of_memory(error)):
            raise
        print(f"error: {message}", file=sys.stderr)  # of whatever rank: others may have enough
        sys.exit(2)
    except OSError as error:  # a path that is not there, not readable, a full disk
        sys.exit(_report(f"{error.filename}: {error.strerror}" if error.filename else str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _report(message: str) -> int:
    """Of processes that a launcher started, which read the same files, one of each machine speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        text = f"error: {message}"  # in logs and pipes a line for each error, so that it can be searched for
        print(wrapped(text) if sys.stderr.isatty() else text, file=sys.stderr)
    return 2
