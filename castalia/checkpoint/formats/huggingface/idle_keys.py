"""Keys of config.json that change nothing about what a causal language model computes, in every class.

Sources: `PretrainedConfig` of transformers 4.57 and 5, and the keys that published folders of older versions have.
"""

from __future__ import annotations

IDLE = frozenset(
    {
        # What the file is and how it was made.
        "architectures", "model_type", "transformers_version", "_name_or_path", "_commit_hash", "tokenizer_class",
        "finetuning_task", "task_specific_params", "problem_type", "prefix", "unsloth_version", "unsloth_fixed",
        # Token ids, which `generation_config.json` and the tokenizer have, too.
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
        # Initial values, and how the same is computed or returned.
        "initializer_range", "init_std", "use_cache", "cache_implementation", "chunk_size_feed_forward",
        "pretraining_tp", "slow_but_exact", "gradient_checkpointing", "attn_implementation", "_attn_implementation",
        "_flash_attn_2_enabled", "reorder_and_upcast_attn", "torchscript", "use_bfloat16", "tf_legacy_loss",
        "return_dict", "output_attentions", "output_hidden_states", "is_decoder", "tie_encoder_decoder",
        # Other heads than that of language models.
        "id2label", "label2id", "num_labels", "classifier_dropout", "summary_type", "summary_use_proj",
        "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "summary_last_dropout",
    }
)  # fmt: skip
# Keys that must be false in every class: they make another model of it.
REFUSED = ("is_encoder_decoder", "add_cross_attention", "pruned_heads")
# Of the table of rotary settings.
ROPE_KEYS = frozenset(
    {
        "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "beta_fast", "beta_slow",
        "low_freq_factor", "high_freq_factor", "attention_factor", "original_max_position_embeddings", "mscale",
        "mscale_all_dim", "truncate", "finetuned",
    }
)  # fmt: skip
