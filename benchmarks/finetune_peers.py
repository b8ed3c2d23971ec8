"""The same tuning by `castalia finetune` and by TRL, on CPUs: losses step by step, CPU seconds a step, peak memory.

    python benchmarks/finetune_peers.py [--steps 12] [--layers 6] [--width 256] [--vocabulary 2048] [--batch 8]
        [--kinds full,lora,dpo] [--rounds 3]

Both sides start from one folder of transformers (a GPT-NeoX with random weights; for adapters a folder of PEFT with
random ones), read the same records in the same order, and update by AdamW at a constant rate, in fp32, without
recomputing activations. Each runs in a process of its own, whose peak memory the system counts; beside it stands what
it is above the memory after the imports. Sides take turns, and a ratio is the median of those of the rounds. CPU
seconds of the process from the end of a step to the end of the next one count, as medians over the steps after the
second: other programs on the machine change them less than they change the time of day.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import results

KJV = Path(__file__).parent.parent / "examples/kjv/kjv.jsonl"
RATE, RANK, BETA = 1e-4, 8, 0.1
WORDS = 16  # of a prompt, and of an answer
VOCABULARY = 2048
SKIPPED = 2  # steps before the median
END = "<|endoftext|>"


def main() -> None:
    """Makes model and data, runs both sides of each kind, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="of the model; the tokenizer has 2,048")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="full,lora,dpo")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    results.option(parser)
    given = parser.parse_args()
    if given.side:
        result = {"ours": ours, "trl": theirs}[given.side](given.kinds, Path(given.folder), given)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, given.layers, given.width, given.vocabulary)
        make_records(folder, given.steps * given.batch)
        print(
            "| kind | largest difference of a loss | first and last loss | CPU seconds a step, ours and TRL |", end=""
        )
        print(" TRL over ours | peak MiB, ours and TRL | ours over TRL | above imports | ours over TRL |")
        print("|---" * 9 + "|")
        for kind in given.kinds.split(","):
            pairs = [[side(name, kind, folder, given) for name in ("ours", "trl")] for _ in range(given.rounds)]
            print(row(kind, pairs), flush=True)
            for number, who in enumerate(("ours", "TRL")):
                results.record(f"{kind}, {who}, a step", [pair[number]["seconds"] for pair in pairs], "cpu")


def side(name: str, kind: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own."""
    sizes = [f"--{option}={getattr(given, option)}" for option in ("steps", "batch")]
    command = [sys.executable, __file__, f"--side={name}", f"--folder={folder}", f"--kinds={kind}", *sizes]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    return json.loads(done.stdout.splitlines()[-1])


def row(kind: str, pairs: list[list[dict[str, Any]]]) -> str:
    """A line of the table: medians over the rounds."""
    apart = max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    cells = [kind, f"{apart:.1e}", f"{pairs[0][0]['losses'][0]:.4f}, {pairs[0][0]['losses'][-1]:.4f}"]
    for key, form in (("seconds", ".3g"), ("peak", ".0f"), ("above", ".0f")):
        sides = [statistics.median(pair[number][key] for pair in pairs) for number in (0, 1)]
        ratios = [pair[0][key] / pair[1][key] for pair in pairs]
        if key == "seconds":
            ratios = [1 / ratio for ratio in ratios]
        cells += [" and ".join(f"{value:{form}}" for value in sides), f"{statistics.median(ratios):.2f}"]
    return f"| {' | '.join(cells)} |"


def make_model(folder: Path, layers: int, width: int, vocabulary: int) -> None:
    """A folder of transformers with a tokenizer, and one of PEFT with adapters on it."""
    import peft
    import tokenizers
    import torch
    import transformers

    texts = [json.loads(line)["text"] for line in KJV.read_text().splitlines()[:200]]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    )
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END, pad_token=END)
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
        attention_dropout=0.0, hidden_dropout=0.0, initializer_range=0.05,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config)
    for kept in (model, words):
        kept.save_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapters")


def make_records(folder: Path, count: int) -> None:
    """Prompts and answers out of the text; the rejected answer is that of another prompt."""
    words = " ".join(json.loads(line)["text"] for line in KJV.read_text().splitlines()[200:400]).split()
    spans = [" ".join(words[start : start + WORDS]) for start in range(0, 2 * WORDS * (count + 1), WORDS)]
    asked, said = spans[0::2], spans[1::2]
    with open(folder / "sft.jsonl", "w") as sft, open(folder / "pairs.jsonl", "w") as pairs:
        for number in range(count):
            print(json.dumps({"prompt": asked[number], "completion": f" {said[number]}"}), file=sft)
            pair = {"prompt": asked[number], "chosen": f" {said[number]}", "rejected": f" {said[number + 1]}"}
            print(json.dumps(pair), file=pairs)


def records_of(kind: str, folder: Path) -> Path:
    return folder / ("pairs.jsonl" if kind == "dpo" else "sft.jsonl")


def resident() -> float:
    """MiB at the highest so far. Unlike `getrusage`, it knows nothing of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measured(losses: list[float], ends: list[float], imported: float) -> dict[str, Any]:
    """What a side gives back. `ends`: CPU seconds of the process at the end of each step."""
    peak, seconds = resident(), [after - before for before, after in pairwise(ends)]
    typical = statistics.median(seconds[SKIPPED - 1 :])
    return {"losses": losses, "seconds": typical, "peak": peak, "above": peak - imported}


def ours(kind: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """`castalia finetune` without its comparison at the end; its order of the records is written down for the peer."""
    from castalia.data.pairs import open_samples, sides_of
    from castalia.finetuning.finetune_run import Request, begin
    from castalia.observe.metrics import read_metrics
    from castalia.train.loop import train
    from castalia.train.step import TrainStep

    imported = resident()
    run, file = Path(tempfile.mkdtemp(dir=folder)), records_of(kind, folder)
    words = [
        f"data.valid={file}",
        "eval.every=null",
        "eval.at_end=false",
        "precision.compute=fp32",
        f"optimizer.lr={RATE}",
    ]
    words += ["optimizer.betas=[0.9, 0.999]", "schedule.style=constant", "schedule.warmup=0", "data.packing=unpacked"]
    words += [
        f"train.steps={given.steps}",
        f"train.batch_size={given.batch}",
        f"checkpoint.dir={run}",
        "log.peak_tflops=1",
    ]
    words += [f"preference.beta={BETA}"] if kind == "dpo" else []
    model = folder / ("adapters" if kind == "lora" else "model")
    request = Request(
        str(model), (str(file),), (), tuple(words), full=kind != "lora", objective="dpo" if kind == "dpo" else None
    )
    stdout, sys.stdout = sys.stdout, sys.stderr  # the last line of standard output is the result
    config = begin(request, lambda name, text: None)
    ends, apply = [], TrainStep.apply

    def clocked(step: TrainStep) -> Any:
        """The update ends a step; what is recorded of it counts to the next one, as the trainer's logs do."""
        result = apply(step)
        ends.append(time.process_time())
        return result

    TrainStep.apply = clocked
    train(config)
    sys.stdout = stdout
    records = list(read_metrics(run))
    side = next(iter(sides_of(open_samples(config)).values()))
    order = [side.pieces(int(at))[0].document for step in range(given.steps) for at in side.positions(step)]
    (folder / f"order-{kind}.json").write_text(json.dumps(order))
    return measured([each["loss"] for each in records], ends, imported)


def theirs(kind: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """TRL's trainer on the same records in the order that was written down."""
    import datasets
    import peft
    import transformers
    import trl

    class Clock(transformers.TrainerCallback):
        """CPU seconds at the end of each step, and its loss."""

        ends: list[float] = []
        losses: list[float] = []

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            self.ends.append(time.process_time())

        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, Any], **more: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    kinds = {"dpo": (trl.DPOTrainer, trl.DPOConfig)}
    trainer_class, config_class = kinds.get(kind, (trl.SFTTrainer, trl.SFTConfig))
    imported = resident()
    rows = [json.loads(line) for line in records_of(kind, folder).read_text().splitlines()]
    order = json.loads((folder / f"order-{kind}.json").read_text())
    data = datasets.Dataset.from_list([rows[number] for number in order])
    settings = {"beta": BETA} if kind == "dpo" else {}
    config = config_class(
        output_dir=str(folder / f"trl-{kind}"), per_device_train_batch_size=given.batch, max_steps=given.steps,
        learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, train_sampling_strategy="sequential", max_length=None,
        disable_tqdm=True, **settings,
    )  # fmt: skip
    words = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    if kind == "lora":
        model = peft.PeftModel.from_pretrained(model, folder / "adapters", is_trainable=True)
    clock = Clock()
    trainer = trainer_class(model=model, args=config, train_dataset=data, processing_class=words, callbacks=[clock])
    stdout, sys.stdout = sys.stdout, sys.stderr
    trainer.train()
    sys.stdout = stdout
    return measured(clock.losses, clock.ends, imported)


if __name__ == "__main__":
    main()
