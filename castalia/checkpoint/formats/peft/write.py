"""Write adapters in PEFT's layout, which the library loads onto the model that `--to hf` writes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from castalia.checkpoint.adapters import adapters_of
from castalia.checkpoint.file_plan import Plan, WriteOptions, json_output, tensors_output
from castalia.checkpoint.formats.huggingface.model_type import SCORE
from castalia.checkpoint.formats.huggingface.names import FAMILIES
from castalia.checkpoint.formats.peft.read import CONFIG, WEIGHT_FILES, Matrix, hf_family, matrices, vocabulary_modules
from castalia.checkpoint.tensors import Checkpoint
from castalia.checkpoint.tokenizer_files import hf_tokenizer
from castalia.config.schema import is_adapter
from castalia.errors import CheckpointError
from castalia.storage.derived import float32
from castalia.storage.lazy import TensorRef


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """The two files, and those of the tokenizer. Raises CheckpointError without adapters, or if more was trained.

    `checkpoint.facts.base` is the path of the model below the adapters.
    """
    lora, run = adapters_of(checkpoint), checkpoint.config
    if lora is None or run is None:
        raise CheckpointError(f"{checkpoint.path} has no adapters; for a whole model use --to hf")
    vocabulary = vocabulary_modules(checkpoint)
    trained = [name for name in checkpoint.model if not is_adapter(name) and run.finetune.trains(name)]
    if run.finetune.add_tokens or not set(trained) <= vocabulary.keys() | {"reward.weight"}:
        raise CheckpointError(
            f"{checkpoint.path}: more than its adapters was trained (finetune.train, finetune.add_tokens), so they are "
            "not the model without the rest; merge them: castalia merge-lora"
        )
    # PEFT can store these with its adapters. The model that they lie on has no reward head.
    whole = {name: vocabulary[name] for name in trained if name in vocabulary}
    whole |= {"reward.weight": SCORE.removesuffix(".weight")} if "reward.weight" in checkpoint.model else {}
    tensors: dict[str, TensorRef] = {
        f"base_model.model.{module}.weight": float32(checkpoint.model[name]) for name, module in whole.items()
    }
    all_matrices, chosen = matrices(checkpoint), []
    for matrix in all_matrices:
        if f"{matrix.name}.lora_a" in checkpoint.model:
            chosen.append(matrix)
            a, b = (checkpoint.model[f"{matrix.name}.{side}"] for side in ("lora_a", "lora_b"))
            for module, rows in zip(matrix.modules, matrix.rows.backward([b], "weight"), strict=True):
                tensors[f"base_model.model.{module}.lora_A.weight"] = float32(a)
                tensors[f"base_model.model.{module}.lora_B.weight"] = float32(rows)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if "reward.weight" in checkpoint.model else "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.facts.base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if (alpha := lora.scale * lora.rank).is_integer() else alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _targets(chosen, all_matrices),
        "modules_to_save": [module.rpartition(".")[2] for module in whole.values()] or None,
        "bias": "none",
        "fan_in_fan_out": hf_family(checkpoint) is FAMILIES["gpt2"],
        "inference_mode": True,
    }
    notes = _head_note(checkpoint, {matrix.name for matrix in chosen} | {name.rpartition(".")[0] for name in whole})
    words, _, without = hf_tokenizer(checkpoint)
    return Plan((json_output(CONFIG, config), tensors_output(WEIGHT_FILES[0], tensors), *words), (*notes, *without))


def _head_note(checkpoint: Checkpoint, held: Collection[str]) -> tuple[str, ...]:
    """A note on the head's name if versions of transformers differ in it: PEFT silently ignores other names."""
    name, *former = hf_family(checkpoint).head_modules
    if "head" not in held or not former:
        return ()
    return (f"the head is called {name}, as transformers 5 does; before, it was {former[0]}, and PEFT finds nothing",)


def _targets(chosen: Sequence[Matrix], all_matrices: Sequence[Matrix]) -> list[str]:
    """`target_modules`: endings of the chosen modules' names, as short as no other module has them."""
    wanted = {module for matrix in chosen for module in matrix.modules}
    others = {module.rpartition(".")[2] for matrix in all_matrices for module in matrix.modules if module not in wanted}
    parts = (module.split(".") for module in wanted)
    return sorted({".".join(part[-2:] if part[-1] in others else part[-1:]) for part in parts})
