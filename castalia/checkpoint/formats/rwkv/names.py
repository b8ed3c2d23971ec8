"""The names of tensors in RWKV's own files. Source: RWKV-LM, `RWKV-v5/src/model.py` (x060)."""

from __future__ import annotations

from castalia.checkpoint.rules import Rule, per_block, with_bias
from castalia.checkpoint.rwkv_tensors import rwkv_rules
from castalia.config.schema import ModelConfig

FIRST_NORM, COPIED = "blocks.0.ln0", "blocks.0.ln1"  # of the embedding; what GPT-NeoX has in its place
# A tensor that only one generation has -> its number; without any of them it is an older one.
GENERATIONS = {
    "blocks.0.att.r_k": 7,
    "blocks.0.att.time_maa_w1": 6,
    "blocks.0.att.time_faaaa": 5,
    "blocks.0.att.time_first": 4,
}


def table(model: ModelConfig) -> list[Rule]:
    """The rules of a model, in the order of the files but for the first norm, which follows block 0's others."""
    first = with_bias("embed_norm", FIRST_NORM) if model.embedding_norm else []
    return [
        Rule("embed.weight", "emb.weight"),
        *per_block(rwkv_rules(model, "blocks.{i}."), model.num_layers),
        *first,
        *with_bias("norm", "ln_out"),
        Rule("head.weight", "head.weight"),
    ]
