"""Names from PEFT and transformers in `finetune.lora`: which matrices of ours they mean, and what is not built in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from castalia.config.setting import Setting

if TYPE_CHECKING:  # the command line reads these names at its start, and no YAML
    from castalia.config.yaml_files import Findings

TARGETS = "finetune.lora.targets"
ALL = "all-linear"  # PEFT's word for all matrices of the blocks, which an empty list means here
QKV = ("q_proj", "k_proj", "v_proj")  # three matrices there, one here
# The last parts of the modules' names in classes of transformers -> our matrices.
MODULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*QKV, "qkv_proj", "query_key_value", "c_attn"), ("attn.qkv",)),
    **dict.fromkeys(("o_proj", "out_proj", "attention.dense", "dense", "attn.c_proj"), ("attn.out",)),
    **dict.fromkeys(("up_proj", "dense_h_to_4h", "c_fc", "fc1"), ("mlp.up",)),
    **dict.fromkeys(("down_proj", "dense_4h_to_h", "fc2", "mlp.c_proj"), ("mlp.down",)),
    **dict.fromkeys(("lm_head", "embed_out"), ("head",)),
    "gate_proj": ("mlp.gate",),
    "in_proj": ("mamba.in_x", "mamba.in_z"),
    "x_proj": ("mamba.x_proj",),
    "dt_proj": ("mamba.dt_proj",),
    "mixer.out_proj": ("mamba.out",),  # out_proj alone is that of attention
    "gate_up_proj": ("mlp.gate", "mlp.up"),
    "c_proj": ("attn.out", "mlp.down"),  # GPT-2 calls both so, and PEFT adapts both
}
QUANTIZED = (
    "weights in 4 or 8 bits below adapters (QLoRA) are not built in: the kernels that train on them run on GPUs alone "
    "and round in ways that nothing here could be compared with; frozen weights take 4 bytes a parameter, which "
    "parallel.zero=3 shares among ranks"
)
DORA = (
    "DoRA's magnitudes beside the adapters are not built in; plain LoRA and rsLoRA (finetune.lora.rslora=true) are. "
    "A model that PEFT has trained so opens here once it is merged there (merge_and_unload)"
)
BEGINNING = (
    "A begins random and B at zero, as PEFT's do by default, so the model begins unchanged and its adapters fit the "
    "model that was downloaded. PiSSA, OLoRA, LoftQ and their kind take a part of the weights away first and are not "
    "built in; leave it out, or train so with PEFT and merge there (merge_and_unload)"
)
BIASES = 'biases train beside adapters with finetune.train=["bias$"]; merge-lora then writes the whole model'
# Keys of PEFT, bitsandbytes and trainers, by their last part.
OTHER_KEYS: dict[str, str] = {
    "r": "it is called finetune.lora.rank",
    "lora_alpha": "it is called finetune.lora.alpha",
    "lora_dropout": "it is called finetune.lora.dropout",
    "target_modules": "it is called finetune.lora.targets, and takes the same names",
    "modules_to_save": 'such modules are named by finetune.train, as in finetune.train=["^embed", "^head"]',
    "use_rslora": "it is called finetune.lora.rslora",
    **dict.fromkeys(("use_dora", "dora"), DORA),
    **dict.fromkeys(("init", "init_lora_weights", "pissa", "olora", "loftq", "loftq_config"), BEGINNING),
    **dict.fromkeys(("bias", "lora_bias"), BIASES),
    "rank_pattern": "all adapters have one rank, finetune.lora.rank",
    "alpha_pattern": "all adapters have one scale, finetune.lora.alpha",
    "layers_to_transform": "every block has adapters; those of some rest with finetune.freeze, as in "
    'finetune.freeze=["blocks\\\\.[0-3]\\\\."]',
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization", "quantization_config", "qlora"), QUANTIZED),
}


def key_of_others(path: str) -> str | None:
    """What a key of PEFT or bitsandbytes is here, or why it is refused; None for any other key."""
    section, _, name = path.replace("-", "_").rpartition(".")
    if name.startswith("bnb_4bit"):
        return QUANTIZED
    known = OTHER_KEYS.get(name)
    # Short names without a section mean many things.
    return known if section in ("finetune", "finetune.lora") or (not section and len(name) > 4) else None


def translate_targets(settings: dict[str, Setting], findings: Findings) -> None:
    """Replaces other programs' names in `finetune.lora.targets` by ours. Unknown ones are left to the schema."""
    setting = settings.get(TARGETS)
    if setting is None:
        return
    names = [setting.value] if isinstance(setting.value, str) else setting.value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return
    ours = [] if names == [ALL] else list(dict.fromkeys(target for name in names for target in _matrices(name)))
    settings[TARGETS] = setting._replace(value=ours)
    named = {name.rpartition(".")[2] for name in names} & set(QKV)
    if others := [name for name in QKV if named and name not in named]:
        findings.notes.append(
            f"{setting.origin}: {TARGETS}: {' and '.join(sorted(named))} lie in one matrix here, attn.qkv, which gets "
            f"one adapter: it changes {' and '.join(others)} as well"
        )


def _matrices(name: str) -> tuple[str, ...]:
    parts = name.split(".")
    for length in (2, 1):  # `mlp.c_proj` says more than `c_proj`
        if found := MODULES.get(".".join(parts[-length:])):
            return found
    return (name,)
