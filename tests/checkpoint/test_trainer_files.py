"""A run goes on in the Trainer of transformers, and a Trainer's run here: same losses, same state."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, get_scheduler
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from castalia.checkpoint.convert import plan_files, prepare, write
from castalia.checkpoint.file_plan import WriteOptions
from castalia.checkpoint.formats.huggingface.names import FAMILIES as KINDS
from castalia.checkpoint.formats.huggingface.names import family_of
from castalia.checkpoint.formats.huggingface.trainer import _shape, arguments_for, full_name, groups
from castalia.checkpoint.opener import open_checkpoint
from castalia.cli.convert import command as convert
from castalia.config.load import load_config
from castalia.config.lr_schedule import LearningRate
from castalia.data.config_corpora import open_data
from castalia.data.dataset_writer import DatasetWriter
from castalia.errors import ConfigError
from castalia.observe.metrics import read_metrics
from castalia.train.loop import train
from castalia.train.schedule import learning_rate
from tests.checkpoint.made import FAMILIES, assert_same, made, written

STEPS, SAVED, BATCH, LENGTH = 12, 6, 4, 16
LLAMA = (
    "model.norm=rmsnorm", "model.gated_mlp=true", "model.activation=silu", "model.attention_bias=false",
    "model.mlp_bias=false", "model.num_kv_heads=2", "model.mlp_size=56", "schedule.style=linear",
)  # fmt: skip
KINDS_OF_RUN = {
    "gpt_neox": ("schedule.style=cosine", "schedule.min_lr=0.0003"),
    "llama": LLAMA,
    "gpt2": ("model.position=learned", "model.tie_embeddings=true", "schedule.style=wsd", "optimizer.clip_norm=null"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("corpus") / "words"
    draw = random.Random(1)
    with DatasetWriter(prefix, "uint16") as writer:
        for _ in range(60):
            writer.add([*bytes(draw.choices(b"the light was good", k=40)), 256])
    return prefix


def words(corpus: Path, folder: Path, *more: str) -> list[str]:
    return [
        "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.vocab_multiple=1",
        "model.max_positions=32", f"data.path={corpus}", f"data.seq_length={LENGTH}", "tokenizer.kind=bytes",
        "data.split=90,10,0", "precision.compute=fp32", "optimizer.lr=0.003", "schedule.warmup_steps=4",
        f"train.steps={STEPS}", f"train.batch_size={BATCH}", f"train.micro_batch_size={BATCH}", "eval.every=null",
        "log.peak_tflops=0.1", "checkpoint.every=3", f"checkpoint.dir={folder}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS_OF_RUN)
def run(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train(load_config([], words(corpus, folder, *KINDS_OF_RUN[request.param])))
    return folder


@pytest.fixture(scope="module")
def folders(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `castalia convert RUN OUT --to hf --trainer` gives."""
    out = tmp_path_factory.mktemp("trainer") / "out"
    convert(str(run), out, to="hf", trainer=True)
    return out


class InOrder(Trainer):
    """Batches in the order of the data, as ours."""

    def _get_train_sampler(self, dataset: object = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def go_on(run: Path, out: Path, **more: object) -> list[float]:
    """The losses of a real Trainer that resumes from its folder's last checkpoint."""
    config = load_config(run)
    samples = open_data(config)
    rows = []
    for step in range(STEPS):
        batch = samples.batch(step)
        rows += [
            [*tokens, labels[-1]] for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
        ]
    # No token predicts the first one, and the Trainer divides by the number of all labels that are not -100.
    data = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]
    # A note prints the arguments; these are computed as the note is.
    given = arguments_for(learning_rate(config, STEPS))
    assert given is not None
    options = TrainingArguments(
        str(out), use_cpu=True, report_to=[], logging_steps=1, save_strategy="steps", save_steps=3, disable_tqdm=True,
        per_device_train_batch_size=BATCH, max_grad_norm=config.optimizer.clip_norm or 0.0, **given, **more,
    )  # fmt: skip
    # transformers 5 renames GPT-NeoX's head in `from_pretrained` alone: its Trainer would begin with a new one.
    start = AutoModelForCausalLM.from_pretrained(out / f"checkpoint-{SAVED}")
    trainer = InOrder(start, options, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{SAVED}"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_trainer_goes_on_with_our_losses_and_we_with_its(
    run: Path, folders: Path, corpus: Path, tmp_path: Path
) -> None:
    assert sorted(each.name for each in folders.iterdir()) == [
        *(f"checkpoint-{step}" for step in (12, 3, 6, 9)),
        "latest",
    ]
    ours = [record["loss"] for record in read_metrics(run)]
    theirs = go_on(run, folders)
    assert theirs == pytest.approx(ours[SAVED:], abs=2e-4)
    # The Trainer has written these two anew. What is left of ours says that it is of other weights.
    assert open_checkpoint(folders, step=3).config.train.steps == STEPS
    for step in (9, 12):
        (folders / f"checkpoint-{step}" / "castalia.json").unlink()
    between = open_checkpoint(folders, step=9)
    assert between.optimizer is not None and between.progress.step == 9 and not between.state_notes
    assert between.config.optimizer.lr == 0.003 and between.config.optimizer.betas == (0.9, 0.95)
    stored = between.progress.schedule
    rates = learning_rate(load_config(run), STEPS)
    if stored is not None and rates.style != "wsd":
        assert {**stored, "warmup_iter": rates.warmup} == rates.stored()
    # Our state after the same nine steps is the Trainer's, up to rounding; so are the losses from there on.
    again = tmp_path / "again"
    kind = next(words for kind, words in KINDS_OF_RUN.items() if run.parent.name.startswith(kind))
    train(load_config([], words(corpus, again, *kind, f"checkpoint.resume={folders}", "checkpoint.step=9",
                                "checkpoint.schedule_from=checkpoint")))  # fmt: skip
    resumed = {record["step"]: record["loss"] for record in read_metrics(again)}
    assert sorted(resumed) == [10, 11, 12]
    assert [resumed[step] for step in (10, 11, 12)] == pytest.approx(ours[9:], abs=2e-4)
    train(load_config([], words(corpus, tmp_path / "nine", *kind, "train.exit_interval=9")))
    nine = open_checkpoint(tmp_path / "nine")
    for name, state in between.optimizer.items():
        assert state["step"] == nine.optimizer[name]["step"]
        assert torch.allclose(
            state["exp_avg_sq"].read(), nine.optimizer[name]["exp_avg_sq"].read(), rtol=2e-3, atol=1e-9
        )
        assert torch.allclose(nine.model[name].read(), between.model[name].read(), atol=2e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_numbers_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    source = made(FAMILIES[kind])
    again = written(source, tmp_path / "out", "hf", trainer=True)
    assert not (tmp_path / "out" / "optimizer.safetensors").exists()
    assert_same(source, again)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "x"), use_cpu=True, report_to=[]))
    decays = set(trainer.get_decay_parameter_names(model))
    names = [name for name, _ in model.named_parameters()]
    expected = [name for name in names if name in decays], [name for name in names if name not in decays]
    family = KINDS[family_of(FAMILIES[kind], kind)]
    found = groups(family, again.config.model)
    assert [[full_name(family, name) for name in group] for group in found] == list(expected)
    stored = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)
    trainer.create_optimizer()
    trainer.optimizer.load_state_dict(stored)
    for name, parameter in model.named_parameters():
        state = trainer.optimizer.state[parameter]
        assert state["step"] == 7 and state["exp_avg"].shape == parameter.shape, name


def bergson_names(stored: dict, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Second moments by name, by the rule that bergson 2.5 documents: an entry's `param_name`, else the order of the
    Trainer's two groups, whose sizes must fit; a bias correction needs `step` and the groups' `betas` and `eps`."""
    decays = {name for name in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in name}
    names = [name for name, _ in model.named_parameters()]
    decays &= set(names)  # a tied head has a second name
    ordered = [name for name in names if name in decays] + [name for name in names if name not in decays]
    assert [len(group["params"]) for group in stored["param_groups"]] == [len(decays), len(names) - len(decays)]
    by_order = dict(
        zip([number for group in stored["param_groups"] for number in group["params"]], ordered, strict=True)
    )
    beta, eps = stored["param_groups"][0]["betas"][1], stored["param_groups"][0]["eps"]
    assert eps > 0
    found = {}
    for number, entry in stored["state"].items():
        assert entry["param_name"] == by_order[number]
        found[entry["param_name"]] = entry["exp_avg_sq"] / (1 - beta ** int(entry["step"].item()))
    return found


@pytest.mark.parametrize(
    ("kind", "more", "known"),
    [
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, True),
        ("cosine_with_min_lr", {"min_lr": 2e-4, "num_cycles": 0.5}, True),
        ("cosine_with_min_lr", {"min_lr": 2e-4, "num_cycles": 1.5}, False),
        ("warmup_stable_decay", {"num_decay_steps": 10, "decay_type": "linear"}, True),
        ("warmup_stable_decay", {"num_decay_steps": 10, "decay_type": "linear", "num_stable_steps": 26}, True),
        ("warmup_stable_decay", {"num_decay_steps": 10, "decay_type": "linear", "num_stable_steps": 5}, False),
        ("warmup_stable_decay", {"num_decay_steps": 10}, False),  # which is a cosine
    ],
)
def test_a_trainers_schedule_is_followed_where_all_of_it_is_known(kind: str, more: dict, known: bool) -> None:
    found = _shape({"lr_scheduler_type": kind, "lr_scheduler_kwargs": more, "warmup_steps": 4}, 1e-3, 40)
    assert (found is not None) == known
    if found is None:
        return
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(kind, optimizer, 4, 40, scheduler_specific_kwargs=more)
    ours = LearningRate.of_stored(found)
    for updates in range(1, 40):  # the first one was made before anything was saved
        optimizer.step()
        theirs.step()
        assert ours(updates) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)


def test_bergson_finds_the_second_moments(tmp_path: Path) -> None:
    source = made(FAMILIES["gpt2"])
    written(source, tmp_path / "out", "hf", trainer=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = bergson_names(torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True), model)
    assert found.keys() == dict(model.named_parameters()).keys()
    ours = source.optimizer["blocks.1.mlp.up.weight"]["exp_avg_sq"].read() / (1 - 0.95**7)
    assert torch.equal(found["transformer.h.1.mlp.c_fc.weight"], ours.T)  # Conv1D is [in, out]


def test_sixteen_bit_weights_are_written_as_their_masters(tmp_path: Path) -> None:
    source = made(FAMILIES["gpt_neox"], dtype=torch.bfloat16)
    plan = plan_files("hf", prepare(source, torch.float32), WriteOptions(trainer=True))
    write(plan, tmp_path / "out", "mark", lambda count: None)
    found = open_checkpoint(tmp_path / "out")
    for name, state in source.optimizer.items():
        assert torch.equal(found.model[name].read(), state["master"].read())
        assert torch.equal(found.optimizer[name]["master"].read(), state["master"].read())


@pytest.mark.parametrize("options", [{"to": "neox"}, {"to": "hf", "optimizer": False}, {"to": "hf", "dtype": "bf16"}])
def test_what_no_trainer_reads_is_refused(options: dict, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--trainer is for --to hf"):
        convert(str(tmp_path), tmp_path / "out", trainer=True, **options)


def damaged(change: Callable[[dict], object], folder: Path) -> None:
    stored = torch.load(folder / "optimizer.pt", weights_only=True)
    change(stored)
    torch.save(stored, folder / "optimizer.pt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state["param_groups"].pop(), "no state or no group"),
        (lambda state: state["state"].clear(), "no state of parameters"),
        (lambda state: [entry.pop("exp_avg") for entry in state["state"].values()], "another optimizer than AdamW"),
        (lambda state: [group.pop("param_names") for group in state["param_groups"]]
         and state["param_groups"].append(state["param_groups"][1] | {"params": []}), "groups have"),
    ],
)  # fmt: skip
def test_a_state_that_is_not_this_models_is_left_out_and_said(
    change: Callable[[dict], object], said: str, tmp_path: Path
) -> None:
    written(made(FAMILIES["llama"]), tmp_path / "out", "hf", trainer=True)
    damaged(change, tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert found.optimizer is None
    assert said in found.state_notes[0] and "fresh moments" in found.state_notes[0]


def test_names_of_the_groups_count_before_their_order(tmp_path: Path) -> None:
    source = made(FAMILIES["gpt_neox"])
    written(source, tmp_path / "out", "hf", trainer=True)

    def swapped(stored: dict) -> None:
        names, numbers = (stored["param_groups"][0][key] for key in ("param_names", "params"))
        names[0], names[1], numbers[0], numbers[1] = names[1], names[0], numbers[1], numbers[0]

    damaged(swapped, tmp_path / "out")
    assert_same(source, open_checkpoint(tmp_path / "out"))
