"""The files in which the Trainer of transformers keeps a run's optimizer, read and written.

    optimizer.pt        AdamW's state by numbers, in two groups: with weight decay, then without
    scheduler.pt        how many updates were made, and their first and their last rate
    trainer_state.json  steps and tokens
    training_args.bin   the arguments: the schedule's form, which the others lack; it is read, not written

Parameters are numbered in the order in which the class defines them, first those with weight decay. Source:
`Trainer.create_optimizer` and `_load_optimizer_and_scheduler` of transformers 5. Written state has names as well:
`param_names` of each group, as torch has it, and `param_name` of each entry, by which the library bergson finds second
moments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from castalia.checkpoint.formats import TRAINER_STATE
from castalia.checkpoint.formats.huggingface.model_type import SCORE, Family
from castalia.checkpoint.formats.huggingface.names import table
from castalia.checkpoint.rules import MOMENTS, to_ours, to_theirs
from castalia.checkpoint.tensors import AdamState, Checkpoint, Progress, state_tensors
from castalia.config.lr_schedule import STORED_NAMES, LearningRate
from castalia.config.schema import ModelConfig, RunConfig
from castalia.config.tensor_table import row_of
from castalia.errors import CheckpointError
from castalia.reading import keys, read_json
from castalia.storage.derived import float32
from castalia.storage.lazy import InMemory, TensorRef
from castalia.storage.torch_file import open_pt
from castalia.storage.unpickle import Inert

if TYPE_CHECKING:  # it needs torch, which descriptions of checkpoints do without
    from castalia.checkpoint.file_plan import OutputFile

OPTIMIZER, SCHEDULER, ARGUMENTS = "optimizer.pt", "scheduler.pt", "training_args.bin"
COUNTS = ("global_step", "num_input_tokens_seen", "max_steps")
# What the Trainer asks for when it resumes: nothing is due.
CONTROL = dict.fromkeys(
    ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log"), False
)
NEVER = 1 << 31  # steps
Count = Annotated[int, Field(ge=0, lt=1 << 60)]
SPLIT_NAME = re.compile(r"(?:(?:h|layers)\.(\d+)\.)?(.+)\.(weight|bias)")
# `lr_scheduler_type` -> the style that gives the same rates; see `_shape` for what more must hold.
STYLES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine", "inverse_sqrt": "inverse_sqrt", "warmup_stable_decay": "wsd",
}  # fmt: skip


def groups(family: Family, model: ModelConfig) -> tuple[list[str], list[str]]:
    """The parameters' names, without the family's prefix, in the order of their numbers: with weight decay, without."""
    rules = table(family, model)
    decays = {name: row_of(rule.ours.split()[0]).decays for rule in rules for name in rule.theirs.split()}
    if not any(family.modules):
        raise CheckpointError(f"the Trainer's optimizer state of {family.class_name} is not known here")
    before, inside, after = (modules.split() for modules in family.modules)
    heads = [family.head.rpartition(".")[0], SCORE.rpartition(".")[0]]

    def place(name: str) -> tuple[int, int, int, int]:
        """Where the class defines a parameter: part of the model, block, module, weight before bias."""
        match = SPLIT_NAME.fullmatch(name)
        assert match, name
        block, module, kind = match.groups()
        if block is not None:
            return 1, int(block), inside.index(module), kind == "bias"
        part, modules = (0, before) if module in before else (2, after) if module in after else (3, heads)
        return part, 0, modules.index(module), kind == "bias"

    ordered = sorted(decays, key=place)
    return [name for name in ordered if decays[name]], [name for name in ordered if not decays[name]]


def full_name(family: Family, name: str) -> str:
    """A parameter's name in the class of transformers 5."""
    module, _, kind = name.rpartition(".")
    if module == family.head.removesuffix(".weight"):
        return f"{family.head_modules[0]}.{kind}"
    return name if name == SCORE else family.prefix + name


# Reading


class TrainerRun(NamedTuple):
    """What the small files of a Trainer's step say."""

    progress: Progress | None = None  # None: the folder is no Trainer's
    settings: Mapping[str, Any] = {}  # of the run's config: optimizer and clipping
    notes: tuple[str, ...] = ()  # for whoever continues training


def read_run(path: Path) -> TrainerRun:
    """How far a Trainer had come when it wrote a step's folder, its schedule and its optimizer's settings."""
    if not (path / TRAINER_STATE).is_file():
        return TrainerRun()
    step, tokens, most = _counts(path)
    stored = {name: _opened(path / name) for name in (SCHEDULER, ARGUMENTS, OPTIMIZER)}
    notes = [f"{name} is not read ({value})" for name, value in stored.items() if isinstance(value, CheckpointError)]
    scheduler, arguments = _table(stored[SCHEDULER]), _attributes(stored[ARGUMENTS])
    made, rates = scheduler.get("last_epoch"), scheduler.get("base_lrs")
    updates = made if type(made) is int and 0 <= made <= step else step
    schedule = None
    if isinstance(rates, list) and rates and _fits(rates[0]) and arguments:
        schedule = _shape(arguments, rates[0], most)
        if schedule is None:
            kind = arguments.get("lr_scheduler_type")
            notes.append(f"the Trainer's schedule {kind} has no equal here: the config's is followed from here on")
    progress = Progress(step=step, skipped=step - updates, tokens=tokens, schedule=schedule)
    return TrainerRun(progress, _settings(_table(stored[OPTIMIZER]), arguments), tuple(notes))


def _opened(path: Path) -> Any:
    """The object in a file; None without the file, the error where it cannot be read. Weights need none of them."""
    try:
        return open_pt(path) if path.is_file() else None
    except CheckpointError as error:
        return error


def _table(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _fits(value: Any) -> bool:
    return type(value) is float and 0 < value < math.inf


def _settings(optimizer: Mapping, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run's config that optimizer.pt and the arguments show."""
    group = next(iter(_list(optimizer, "param_groups")), {})
    rate, decay, clip = group.get("initial_lr"), group.get("weight_decay"), arguments.get("max_grad_norm")
    found: dict[str, Any] = {"optimizer.lr": rate} if _fits(rate) else {}
    if _fits(group.get("eps")):
        found["optimizer.eps"] = group["eps"]
    if decay == 0 or _fits(decay):
        found["optimizer.weight_decay"] = decay
    if clip == 0 or _fits(clip):
        found["optimizer.clip_norm"] = clip or None  # the Trainer does not clip at 0
    betas = group.get("betas")
    if isinstance(betas, tuple | list) and len(betas) == 2 and all(type(b) is float and 0 <= b < 1 for b in betas):
        found["optimizer.betas"] = tuple(betas)
    return found


def read_optimizer(
    path: Path, family: Family, model: ModelConfig, weights: Mapping[str, TensorRef]
) -> tuple[dict[str, AdamState] | None, str]:
    """AdamW's state by our names, and a note where optimizer.pt cannot be read as such; None without one."""
    if not (path / OPTIMIZER).is_file():
        return None, ""
    try:
        return _read_optimizer(open_pt(path / OPTIMIZER), family, model, weights), ""
    except (_Unfit, CheckpointError) as reason:  # the weights can be used without it
        return None, unread(str(reason))


def unread(reason: str) -> str:
    """What to tell whoever trains on, where the state in optimizer.pt is left out."""
    return f"optimizer.pt is not read ({reason}): a run that continues from these weights begins with fresh moments"


class _Unfit(Exception):
    """Why a state cannot be attributed to our tensors."""


def _read_optimizer(
    stored: Any, family: Family, model: ModelConfig, weights: Mapping[str, TensorRef]
) -> dict[str, AdamState]:
    state = stored.get("state") if isinstance(stored, dict) else None
    if not isinstance(state, dict) or not state:
        raise _Unfit("it holds no state of parameters, as before the first update")
    names = _names(_list(stored, "param_groups"), groups(family, model), family)
    if missing := names.keys() - state.keys() or state.keys() - names.keys():
        raise _Unfit(f"parameter {min(missing, key=str)} has no state or no group")
    theirs: dict[str, dict[str, list[TensorRef]]] = {role: {} for role in MOMENTS}
    steps: dict[str, int] = {}
    for number, name in names.items():
        entry = state[number]
        if not isinstance(entry, dict) or not {"step", *MOMENTS} <= entry.keys() or "max_exp_avg_sq" in entry:
            raise _Unfit("it is the state of another optimizer than AdamW")
        for role in MOMENTS:
            theirs[role][name] = [float32(entry[role])]
        count = entry["step"]
        steps[name] = int(count.read().item() if isinstance(count, TensorRef) else count)
    rules = table(family, model)
    ours = {role: to_ours(rules, theirs[role], role) for role in MOMENTS}
    for name, ref in ours["exp_avg_sq"].items():
        if ref.shape != weights[name].shape:
            raise _Unfit(f"the moments of {name} have shape {list(ref.shape)}, it has {list(weights[name].shape)}")
    of = {rule_name: rule.theirs.split()[0] for rule in rules for rule_name in rule.ours.split()}
    return {
        name: AdamState(
            master=float32(weights[name]), exp_avg=ours["exp_avg"][name], exp_avg_sq=ours["exp_avg_sq"][name],
            step=steps[of[name]],
        )
        for name in weights
    }  # fmt: skip


def _names(stored: Sequence[Mapping], known: tuple[list[str], list[str]], family: Family) -> dict[Any, str]:
    """The number of each parameter -> its name, from the names in the groups if there are any, else by order."""
    numbers: list[list] = [group["params"] for group in stored if isinstance(group.get("params"), list)]
    if len(numbers) < len(stored):
        raise _Unfit("its groups name no parameters")
    flat = [number for each in numbers for number in each]
    expected = [name for group in known for name in group]
    given = [name for group in stored for name in group.get("param_names") or ()]
    by_full = {full_name(family, name): name for name in expected}
    by_full |= {f"{module}.weight": family.head for module in family.head_modules if family.head in expected}
    if given and len(given) == len(flat) and set(given) <= by_full.keys():
        return {number: by_full[name] for number, name in zip(flat, given, strict=True)}
    sizes, wanted = [len(each) for each in numbers], [len(group) for group in known]
    if sizes != wanted:
        raise _Unfit(f"its groups have {sizes} parameters, those of this model {wanted}")
    return dict(zip(flat, expected, strict=True))


def _list(value: Any, name: str) -> list[dict]:
    """The dicts in a list of a table that a file holds."""
    found = value.get(name) if isinstance(value, dict) else None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _counts(path: Path) -> tuple[int, int, int]:
    state = read_json(path / TRAINER_STATE, CheckpointError, keys(dict.fromkeys(COUNTS, Count | None)))
    step, tokens, most = (state.get(name) or 0 for name in COUNTS)
    return step, tokens, most


def _attributes(arguments: Any) -> dict[str, Any]:
    """The attributes of TrainingArguments, with the values of their enums."""
    fields = arguments.fields if isinstance(arguments, Inert) else {}
    return {
        name: value.value if isinstance(value, Inert) and value.args else value
        for name, value in fields.items()
        if isinstance(value, Inert | int | float | str | dict)
    }


def _shape(arguments: Mapping[str, Any], rate: float, most: int) -> dict[str, object] | None:
    """The schedule under the names of `LearningRate.stored`; None where no style of ours gives the same rates."""
    kind, more = arguments.get("lr_scheduler_type"), arguments.get("lr_scheduler_kwargs") or {}
    style = STYLES.get(str(kind))
    warmup = arguments.get("warmup_steps") or 0
    share = warmup if 0 < warmup < 1 else 0 if warmup else arguments.get("warmup_ratio") or 0
    warmup = math.ceil(most * share) if share else int(warmup)
    cooldown, minimum = 0.0, 0.0
    if kind == "constant":
        warmup = 0
    if kind == "cosine_with_min_lr":
        minimum = more.get("min_lr") or (more.get("min_lr_rate") or 0.0) * rate
        if more.keys() - {"min_lr", "min_lr_rate", "num_cycles"} or more.get("num_cycles", 0.5) != 0.5:
            style = None
    elif kind == "warmup_stable_decay":
        cooldown = float(more.get("num_decay_steps") or 0)
        if (
            more.get("decay_type") != "linear"
            or more.get("warmup_type", "linear") != "linear"
            or more.get("min_lr_ratio")
            or more.get("num_stable_steps") not in (None, most - warmup - cooldown)  # else the rate falls earlier
        ):
            style = None
    elif more or (kind == "inverse_sqrt" and not warmup):
        style = None
    if style is None or not most:
        return None
    return LearningRate(rate, float(minimum), float(warmup), most, style, cooldown).stored()


# Writing


def trainer_files(
    checkpoint: Checkpoint, family: Family, model: ModelConfig
) -> tuple[list[OutputFile], tuple[str, ...]]:
    """The Trainer's files of a checkpoint, and notes. Raises CheckpointError for one without optimizer state."""
    import torch

    from castalia.checkpoint.file_plan import json_output, pt_output

    state, config, progress = checkpoint.optimizer, checkpoint.config or RunConfig(), checkpoint.progress
    if state is None:
        raise CheckpointError(
            f"{checkpoint.path} holds no optimizer state, so that no Trainer can go on from it; leave out --trainer"
        )
    rules = table(family, model)
    moments: dict[str, Mapping[str, Sequence[TensorRef]]] = {
        role: to_theirs(rules, {name: float32(state_tensors(entry)[role]) for name, entry in state.items()}, role)
        for role in MOMENTS
    }
    steps = {name: state[rule.ours.split()[0]]["step"] for rule in rules for name in rule.theirs.split()}
    rates = _schedule(checkpoint)
    updates = progress.step - progress.skipped
    peak, now = (config.optimizer.lr,) * 2 if rates is None else (rates.peak, rates(updates))
    entries: dict[int, dict[str, Any]] = {}
    stored_groups = []
    for names, decay in zip(groups(family, model), (config.optimizer.weight_decay, 0.0), strict=True):
        first = len(entries)
        for name in names:
            entries[len(entries)] = {
                "step": InMemory(torch.tensor(float(steps[name]))),
                **{role: moments[role][name][0] for role in MOMENTS},
                "param_name": full_name(family, name),
            }
        stored_groups.append(
            {
                "weight_decay": decay, "lr": now, "betas": tuple(config.optimizer.betas), "eps": config.optimizer.eps,
                "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
                "fused": True, "decoupled_weight_decay": True, "initial_lr": peak,
                "params": list(range(first, len(entries))), "param_names": [full_name(family, name) for name in names],
            }
        )  # fmt: skip
    scheduler = {
        "base_lrs": [peak, peak], "last_epoch": updates, "_step_count": updates + 1, "_is_initial": False,
        "_get_lr_called_within_step": False, "_last_lr": [now, now], "lr_lambdas": [None, None],
    }  # fmt: skip
    counts = {
        "epoch": 0.0, "global_step": progress.step, "max_steps": config.train.steps or 0, "log_history": [],
        "num_input_tokens_seen": progress.tokens,
        "train_batch_size": config.train.micro_batch_size or config.train.batch_size or 1,
        # The Trainer follows these rather than its arguments once it resumes.
        "logging_steps": 1,
        "eval_steps": config.eval.every or NEVER,
        "save_steps": config.checkpoint.every or NEVER,
        "stateful_callbacks": {"TrainerControl": {"args": CONTROL, "attributes": {}}},
    }  # fmt: skip
    files = [
        pt_output(OPTIMIZER, {"state": entries, "param_groups": stored_groups}),
        pt_output(SCHEDULER, scheduler),
        json_output(TRAINER_STATE, counts),
    ]
    return files, _notes(checkpoint, rates)


def _schedule(checkpoint: Checkpoint) -> LearningRate | None:
    """The schedule that the run follows: the stored one, else the config's; None where neither says how long it is."""
    stored, config = checkpoint.progress.schedule or {}, checkpoint.config
    if {*STORED_NAMES.values()} - {"decay_style"} <= stored.keys():
        return LearningRate.of_stored({"decay_style": config.schedule.style if config else "cosine", **stored})
    end = config.schedule.decay_end(config.train.steps or 0) if config else 0
    if config is None or not end:
        return None
    own = config.schedule
    cooldown = own.cooldown * end if own.style == "wsd" else 0.0
    return LearningRate(config.optimizer.lr, own.min_lr, own.warmup_length(end), end, own.style, cooldown)


def arguments_for(rates: LearningRate) -> dict[str, Any] | None:
    """The TrainingArguments that give these rates; None where the Trainer has no such schedule."""
    kind: str | None = next((kind for kind, style in STYLES.items() if style == rates.style), None)
    found: dict[str, Any] = {
        "learning_rate": rates.peak,
        "max_steps": rates.end,
        "warmup_steps": math.ceil(rates.warmup),
    }
    if rates.style == "constant":
        kind = "constant_with_warmup" if rates.warmup else "constant"
    elif rates.style == "cosine" and rates.minimum:
        kind, found["lr_scheduler_kwargs"] = "cosine_with_min_lr", {"min_lr": rates.minimum}
    elif rates.style == "wsd":
        more = {"num_decay_steps": rates.cooldown, "decay_type": "linear"}
        found["lr_scheduler_kwargs"] = more
    elif rates.style == "inverse_sqrt" and not rates.warmup:
        kind = None
    if kind is None or (rates.minimum and rates.style not in ("cosine", "constant")):
        return None
    return {"lr_scheduler_type": kind, **found}


def _notes(checkpoint: Checkpoint, rates: LearningRate | None) -> tuple[str, ...]:
    """How a Trainer goes on as the run would, and what it cannot take over."""
    config = checkpoint.config or RunConfig()
    optimizer = config.optimizer
    arguments = None if rates is None else arguments_for(rates)
    if arguments is None:
        what = "how long its schedule is" if rates is None else f"a schedule of style {rates.style} with these values"
        lines = [
            f"the run's config does not say {what}"
            if rates is None
            else f"the Trainer does not have {what}: its own TrainingArguments decide the rates from here on"
        ]
    else:
        arguments |= {"weight_decay": optimizer.weight_decay, "max_grad_norm": optimizer.clip_norm or 0.0}
        arguments |= {"adam_beta1": optimizer.betas[0], "adam_beta2": optimizer.betas[1], "adam_epsilon": optimizer.eps}
        words = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        lines = [f"a Trainer of the model from_pretrained here goes on as the run with TrainingArguments({words})"]
    if optimizer.groups or optimizer.layer_decay != 1.0:
        lines.append("the Trainer has one rate and one decay: optimizer.groups and layer_decay end here")
    if checkpoint.progress.loss_scale:
        lines.append("the loss scale of fp16 is not written: the Trainer begins with its own")
    return tuple(lines)
