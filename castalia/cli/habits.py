"""What people used to other programs type, and today's command for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from castalia.config.lora_names import OTHER_KEYS, QUANTIZED, key_of_others
from castalia.errors import ConfigError

COMMANDS = {
    "deepy": "castalia train A.yml B.yml",
    "pretrain": "castalia train CONFIG",
    "preprocess_data": "castalia data prepare FILE... --tokenizer tokenizer.json --output PREFIX",
    "preprocess_data_with_mask": "castalia data prepare FILE... --mask-before-token IDS --output PREFIX",
    "preprocess_data_with_chat_template": "castalia data prepare FILE... --chat-template FILE --output PREFIX",
    "prepare_data": "castalia data prepare FILE... --tokenizer tokenizer.json --output PREFIX",
    "merge_datasets": "castalia data merge A B --output PREFIX",
    "merge20b": "castalia convert SRC DST --to neox --layout tp=1,pp=1",
    "convert_neox_to_hf": "castalia convert SRC DST --to hf --verify",
    "convert_hf_to_gguf": "castalia convert SRC model.gguf --to gguf",
    "convert_hf_to_sequential": "castalia convert SRC DST --to neox",
    "convert_raw_llama_weights_to_neox": "castalia convert SRC DST --to neox",
    "inspect_checkpoints": "castalia inspect PATH",
    "evaluate": "castalia eval A.yml B.yml, or castalia eval CHECKPOINT",
    "resume": "castalia train RUN",
}
OPTIONS = {
    "-d": "there is no folder of configs: give whole paths, castalia train DIR/A.yml DIR/B.yml",
    "--conf_dir": "there is no folder of configs: give whole paths, castalia train DIR/A.yml DIR/B.yml",
    "--input": "files and folders are plain arguments: castalia data prepare FILE... --output PREFIX",
    "--output-prefix": "it is called --output and writes the same file names",
    "--tokenizer-type": "it is called --tokenizer-kind; mostly --tokenizer FILE is enough",
    "--vocab-file": "it is called --tokenizer",
    "--vocab": "it is called --tokenizer",
    "--merge-file": "it is called --merges",
    "--dataset-impl": "corpora are always written for memory mapping: leave it out",
    "--eval_tasks": "it is called --tasks: castalia eval CHECKPOINT --tasks NAME,NAME",
    "--eval_results_prefix": "it is called --output FILE; as a setting eval.results_prefix=PREFIX",
    "--num_gpus": "it is called --nproc",
    "--nproc-per-node": "it is called --nproc; on several machines: castalia launch",
    "--nproc_per_node": "it is called --nproc; on several machines: castalia launch",
    "--mfu": "it is called --efficiency, the share of the peak that matrix products reach; MFU is what is left of it",
    "--learning_rate": "settings are given as KEY=VALUE: optimizer.lr=3e-4",
    "--qlora": f"{QUANTIZED}; adapters of rank 16 are --lora 16",
    "--rslora": "it is a setting: finetune.lora.rslora=true",
    "--dora": OTHER_KEYS["dora"],
    "--lora_r": "it is called --lora",
    "--lora-r": "it is called --lora",
    "--lora_target_modules": "it is a setting: finetune.lora.targets=[q_proj, v_proj], or all-linear",
    "--lr": "settings are given as KEY=VALUE: optimizer.lr=3e-4",
}


def refuse_habits(words: Sequence[str], verbs: Sequence[str]) -> None:
    """Raise ConfigError that names today's command for a command or option of GPT-NeoX, torchrun or other trainers.

    `words`: the command line after the program's name.
    """
    verb = next((word for word in words if not word.startswith("-")), "")
    # Scripts are typed with folder and ending, such as tools/datasets/preprocess_data.py.
    if verb not in verbs and (today := COMMANDS.get(Path(verb).name.removesuffix(".py"))):
        raise ConfigError(f"there is no command {verb}; today it is: {today}")
    if verb == "lm-eval":  # whose options are its own
        return
    for word in words:
        name = word.partition("=")[0]  # --lr=3e-4 as well as --lr 3e-4
        if today := OPTIONS.get(name) or (key_of_others(name[2:]) if name.startswith("--") else None):
            raise ConfigError(f"there is no option {name}: {today}")
