"""What each of GPT-NeoX's 321 arguments does here: one row each, with GPT-NeoX's default.

`to`: honoured as one of our keys. `joint`: honoured together with other arguments, by a function of `model_keys.py` or
`training_keys.py`. `idle`: accepted without effect, for the reason given. `refused`: accepted only while it is switched
off, for the reason given. `renamed`: a name of older releases. The arguments are those of
`megatron/neox_arguments/neox_args.py` and `deepspeed_args.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple


class Key(NamedTuple):
    """A row of the table."""

    kind: Literal["to", "joint", "idle", "refused", "renamed"]
    target: str  # our key or keys; for `idle` and `refused` the reason; for `renamed` GPT-NeoX's current name
    default: Any = None
    convert: Callable[[Any], Any] | None = None  # `to`: GPT-NeoX's value to ours; raises ValueError with a reason
    type: type | None = None  # `joint`: the type that its function expects


def to(target: str, default: Any = None, convert: Callable[[Any], Any] | None = None) -> Key:
    """Honoured as the key `target`."""
    return Key("to", target, default, convert)


def joint(target: str, type: type, default: Any = None) -> Key:
    """Honoured together with others; `target` names our keys."""
    return Key("joint", target, default, None, type)


def idle(reason: str, default: Any = None) -> Key:
    """Accepted without effect."""
    return Key("idle", reason, default)


def refused(reason: str, default: Any = None) -> Key:
    """Refused unless it is switched off."""
    return Key("refused", reason, default)


def renamed(name: str) -> Key:
    """An argument of older releases that has another name today."""
    return Key("renamed", name)


def lower(value: Any) -> Any:
    """Text in small letters, as GPT-NeoX compares it; other values unchanged."""
    return value.lower() if isinstance(value, str) else value


def truth(value: Any) -> bool:
    """The value, for settings of ours that take words, too. Raises ValueError for other types than true and false."""
    if not isinstance(value, bool):
        raise ValueError("is neither true nor false")
    return value


def opposite(value: Any) -> bool:
    """The negation, for settings that GPT-NeoX words the other way round. Raises ValueError for other types."""
    return not truth(value)


def recomputed(value: Any) -> str:
    """`train.recompute` for `checkpoint_activations`."""
    return "none" if opposite(value) else "full"


def nonzero(value: Any) -> Any:
    """None for 0, which GPT-NeoX uses for "never"."""
    return None if value == 0 else value


def position(value: Any) -> Any:
    """`model.position` for `pos_emb`. Raises ValueError for T5's relative positions."""
    if lower(value) == "rpe":
        raise ValueError("is refused: T5's relative positions are not built in; rotary, learned, sinusoidal, alibi are")
    return lower(value)


LAUNCH = "processes are started by torchrun or any launcher that sets the same variables"
DEEPSPEED = "DeepSpeed is not used"
DERIVED = "GPT-NeoX derives it from other keys"
REDUCTION = "gradients are accumulated and reduced in fp32"
FUSION = "PyTorch's own fused kernels compute the same"
FP8 = "no layer of Transformer Engine is used; precision.compute=fp8 multiplies in float8, with scales of its own"
TRACKER = "metrics go to metrics.jsonl, TensorBoard, W&B and CSV"
METRICS = "metrics.jsonl in the run's folder has all metrics, the global gradient norm included"
PROFILE = "metrics.jsonl has the time of every step, log.profile that of every operation"
RECOMPUTE = "activation checkpointing always works block by block"
RANDOM = "no generator state is stored: random numbers depend on seed, step and rank alone"
LOSS_SCALE = "as in GPT-NeoX, only the fp16 block counts"
FP32_MATH = "softmax and loss are always computed in fp32"
CURRENT_LENGTH = "internal to GPT-NeoX: the length follows from the step"
DATA_EFFICIENCY = "of DeepSpeed's data efficiency only curriculum_learning is built in"
ONLINE = "online training on generated texts is not built in"
REINFORCE = "train_impl: reinforce is not built in, and refused where it is asked for"
MAMBA = "Mamba layers are computed in one way, which gives the same"
MOE_FP32 = "GPT-NeoX has no load-balancing loss that it would act on"
MOE_DEEPSPEED = "GPT-NeoX gave up DeepSpeed's experts for moe_num_experts, moe_expert_interval and moe_top_k"
SPARSE = "sparse attention is not built in, and no layer uses it"
RPE = "T5's relative positions are not used"

# fmt: off
KEYS: dict[str, Key] = {
    # DeepspeedConfig
    "deepspeed": idle(DEEPSPEED, True),
    "train_batch_size": to("train.batch_size"),
    "train_micro_batch_size_per_gpu": to("train.micro_batch_size"),
    "gradient_accumulation_steps": joint("train.accumulation", int, 1),
    "optimizer": joint("optimizer.name, lr, betas, eps, momentum", dict),
    "scheduler": idle(DEEPSPEED),
    "fp32_allreduce": idle(REDUCTION, False),
    "prescale_gradients": idle(REDUCTION, False),
    "gradient_predivide_factor": idle(REDUCTION, 1.0),
    "sparse_gradients": idle(REDUCTION, False),
    "fp16": joint("precision.compute, precision.loss_scale", dict),
    "bf16": joint("precision.compute", dict),
    "amp": refused("Apex mixed precision is not built in: use fp16 or bf16"),
    "gradient_clipping": joint("optimizer.clip_norm", float, 1.0),
    "zero_optimization": joint("parallel.zero", dict),
    "curriculum_learning": joint("data.seq_length_warmup.start, steps, multiple, root", dict),
    "curriculum_seqlen": idle(CURRENT_LENGTH, 0),
    "steps_per_print": idle(DEEPSPEED, 10),
    "wall_clock_breakdown": idle(PROFILE, False),
    "dump_state": idle(DEEPSPEED, False),
    "flops_profiler": idle(PROFILE),
    "communication_data_type": idle(REDUCTION),
    "autotuning": refused("autotuning is not built in: `castalia plan` names layouts that fit"),
    "activation_checkpointing": idle(DEEPSPEED),
    "sparse_attention": idle(SPARSE),
    "data_efficiency": refused(DATA_EFFICIENCY),
    "tensorboard": joint("log.tensorboard", dict),
    "wandb": joint("log.wandb.project, group, team", dict),
    "csv_monitor": joint("log.csv", dict),
    "elasticity": refused("an elastic batch size is not built in: the batch stays, ranks may change"),
    "comms_logger": idle(METRICS),
    "compression_training": refused("model compression is not built in"),
    "checkpoint": idle(DEEPSPEED),
    "data_types": idle(REDUCTION),
    "deepspeed_extra_args": idle(DEEPSPEED),
    # DeepspeedRunner
    "hostfile": idle("`castalia launch --hostfile` takes it: a script names the machines, a config does not"),
    "include": idle(LAUNCH),
    "exclude": idle(LAUNCH),
    "num_nodes": idle(LAUNCH, -1),
    "num_gpus": idle(LAUNCH),
    "master_port": idle(LAUNCH, 29500),
    "master_addr": idle(LAUNCH),
    "launcher": idle(LAUNCH, "pdsh"),
    "force_multi": idle(LAUNCH, False),
    "autotuning_run": refused("autotuning is not built in: `castalia plan` names layouts that fit"),
    "no_ssh_check": idle(LAUNCH, False),
    "comment": idle(LAUNCH),
    "account": idle(LAUNCH),
    # Parallelism
    "pipe_parallel_size": joint("parallel.pp, model.init_passes", int, 0),
    "model_parallel_size": joint("parallel.tp, model.vocab_multiple", int, 1),
    "pipe_partition_method": idle("a stage is balanced by the cost of its layers", "type:transformer|mlp"),
    "world_size": idle(DERIVED),
    "is_pipe_parallel": idle(DERIVED, False),
    "sequence_parallel": to("parallel.sequence_parallel", False),
    # Model
    "precision": joint("precision.compute", str),
    "num_layers": to("model.num_layers"),
    "hidden_size": to("model.hidden_size"),
    "intermediate_size": joint("model.mlp_size, model.mamba.width, model.rwkv.width", int),
    "mlp_multiple_of": joint("model.mlp_size", int, 1),
    "expansion_factor": joint("model.mlp_size, model.mamba.width, model.rwkv.width", float),
    "num_attention_heads": to("model.num_heads"),
    "num_kv_heads": to("model.num_kv_heads"),
    "seq_length": to("data.seq_length"),
    "sliding_window_width": to("model.sliding_window"),
    "max_position_embeddings": to("model.max_positions"),
    "norm": joint("model.norm", str, "layernorm"),
    "layernorm_fusion": idle(FUSION, False),
    "rmsnorm_fusion": idle(FUSION, False),
    "use_qk_layernorm": to("model.qk_norm", False, truth),
    "layernorm_epsilon": joint("model.norm_eps", float, 1e-05),
    "rms_norm_epsilon": joint("model.norm_eps", float, 1e-08),
    "scalenorm_epsilon": joint("model.norm_eps", float, 1e-08),
    "pos_emb": to("model.position", "learned", position),
    "rpe_num_buckets": idle(RPE, 32),
    "rpe_max_distance": idle(RPE, 128),
    "opt_pos_emb_offset": refused("positions with an offset are not built in", 0),
    "no_weight_tying": to("model.tie_embeddings", False, opposite),
    "attention_config": joint("model.pattern", list),
    "sparsity_config": idle(SPARSE),
    "num_unique_layers": joint("as many as num_layers", int),
    "param_sharing_style": idle("layers do not share weights", "grouped"),
    "make_vocab_size_divisible_by": joint("model.vocab_multiple", int, 128),
    "activation": joint("model.activation, model.gated_mlp", str, "gelu"),
    "use_flashattn_swiglu": idle(FUSION, False),
    "scaled_upper_triang_masked_softmax_fusion": idle(FUSION, False),
    "scaled_masked_softmax_fusion": idle(FUSION, False),
    "bias_gelu_fusion": joint("model.activation", bool, False),
    "bias_dropout_fusion": idle(FUSION, False),
    "rope_fusion": idle(FUSION, False),
    "fused_kernels_build_path": idle(FUSION),
    "fp16_lm_cross_entropy": idle(FP32_MATH, False),
    "init_method_std": to("model.init_std", 0.02),
    "apply_query_key_layer_scaling": idle(FP32_MATH, False),
    "use_cpu_initialization": idle("initial weights depend on seed, name and position alone", False),
    "attention_softmax_in_fp32": idle(FP32_MATH, False),
    "rotary_pct": to("model.rotary_pct", 1.0),
    "rotary_emb_base": to("model.rotary_base", 10000),
    "rotary_save_freqs_buffer": idle("rotary frequencies are derived, never stored", False),
    "init_method": to("model.init_method", "normal", lower),
    "output_layer_init_method": to("model.output_init_method", "scaled_normal", lower),
    "gmlp_attn_dim": joint("model.amlp_size", int, 64),
    "gpt_j_residual": to("model.parallel_residual", False),
    "gpt_j_tied": joint("model.shared_norm", bool, False),
    "use_bias_in_norms": idle("as in GPT-NeoX, norms keep their biases", True),
    "use_bias_in_attn_linear": to("model.attention_bias", True),
    "use_bias_in_mlp": to("model.mlp_bias", True),
    "soft_prompt_tuning": refused("soft prompts are not built in"),
    "mamba_selective_scan_fusion": idle(MAMBA, False),
    "mamba_causal_conv_fusion": idle(MAMBA, False),
    "mamba_inner_func_fusion": idle(MAMBA, False),
    "mamba_selective_fp32_params": idle("weights are fp32 in training, and the scan always computes in fp32", True),
    "mamba_use_bias_in_conv": joint("model.mamba.conv_bias", bool, True),
    "mamba_use_bias_in_linears": joint("model.mamba.linear_bias", bool, False),
    "output_layer_parallelism": refused("the head is split by columns only", "column"),
    "serve_model_weights": refused("serving weights to other programs is not built in", False),
    "weight_server_port": idle("weights are not served", 6000),
    "online_dataserver_ips": idle("no texts are fetched while training", "localhost"),
    "online_dataserver_ports": idle("no texts are fetched while training", 10000),
    "te_columnparallel": idle(FUSION, False),
    "te_rowparallel": idle(FUSION, False),
    "te_layernorm_mlp": idle(FUSION, False),
    "te_mha": idle(FUSION, False),
    "te_fp8_format": idle(FP8, "hybrid"),
    "te_fp8_wgrad": idle(FP8, True),
    "te_fp8_amax_history_len": idle(FP8, 1),
    "te_fp8_amax_compute_algo": idle(FP8, "most_recent"),
    "te_fp8_margin": idle(FP8, 0),
    "te_fp8_mha": idle(FP8, False),
    "dim_att": joint("the same as hidden_size", int),
    "head_size": idle("GPT-NeoX sets it to hidden_size / num_attention_heads itself"),
    "ffn_dim": idle("GPT-NeoX sets it by intermediate_size or expansion_factor itself"),
    # Optimizer
    "optimizer_type": idle(DERIVED, "adam"),
    "use_bnb_optimizer": refused("8-bit optimizer states are not built in", False),
    "zero_stage": idle(DERIVED),
    "zero_reduce_scatter": idle(DERIVED),
    "zero_contiguous_gradients": idle(DERIVED),
    "zero_reduce_bucket_size": idle(DERIVED),
    "zero_allgather_bucket_size": idle(DERIVED),
    "lr": joint("optimizer.lr", float),
    # LRScheduler
    "lr_decay_style": to("schedule.style", "linear", lower),
    "lr_decay_iters": to("schedule.decay_steps"),
    "lr_decay_fraction": joint("schedule.decay_fraction", float),
    "min_lr": to("schedule.min_lr", 0.0),
    "warmup": to("schedule.warmup", 0.01),
    "override_lr_scheduler": joint("checkpoint.schedule_from", bool, False),
    "use_checkpoint_lr_scheduler": joint("checkpoint.schedule_from", bool, False),
    # Logging
    "use_wandb": joint("log.wandb.project", bool),
    "wandb_group": joint("log.wandb.group", str),
    "wandb_run_name": joint("log.wandb.name", str),
    "wandb_team": joint("log.wandb.team", str),
    "wandb_project": joint("log.wandb.project", str, "neox"),
    "wandb_host": joint("log.wandb.host", str, "https://api.wandb.ai"),
    "wandb_init_all_ranks": idle("the first rank logs for all", False),
    "git_hash": idle(DERIVED),
    "log_dir": idle(METRICS),
    "tensorboard_writer": idle(DERIVED),
    "tensorboard_dir": to("log.tensorboard"),
    "use_comet": idle(TRACKER),
    "comet_workspace": idle(TRACKER),
    "comet_project": idle(TRACKER),
    "comet_experiment_name": idle(TRACKER),
    "comet_tags": idle(TRACKER),
    "comet_others": idle(TRACKER),
    "comet_experiment": idle(DERIVED),
    "peak_theoretical_tflops": to("log.peak_tflops"),
    "log_interval": to("log.every", 100),
    "log_grad_pct_zeros": joint("log.layers_every", bool, False),
    "log_param_norm": joint("log.layers_every", bool, False),
    "log_grad_norm": joint("log.layers_every", bool, False),
    "log_optimizer_states": idle(METRICS, False),
    "log_gradient_noise_scale": idle(METRICS, False),
    "gradient_noise_scale_n_batches": idle(METRICS, 5),
    "gradient_noise_scale_cpu_offload": idle(METRICS, False),
    "memory_profiling": joint("log.profile.start", bool, False),
    "memory_profiling_path": joint("log.profile.dir", str),
    "profile": joint("log.profile.start", bool, False),
    "profile_step_start": joint("log.profile.start", int, 10),
    "profile_step_stop": joint("log.profile.stop", int, 12),
    # Other
    "distributed_backend": idle(LAUNCH, "nccl"),
    "local_rank": idle(DERIVED),
    "rank": idle(DERIVED),
    "lazy_mpu_init": idle(FUSION, False),
    "short_seq_prob": idle("GPT-NeoX never reads it", 0.1),
    "eod_mask_loss": to("data.mask_after_eod", False),
    "adlr_autoresume": idle("a run resumes by itself from its folder", False),
    "adlr_autoresume_object": idle(DERIVED),
    "adlr_autoresume_interval": idle("a run resumes by itself from its folder", 1000),
    "seed": to("seed", 1234),
    "onnx_safe": joint("model.activation", bool, False),
    "deepscale": idle(DEEPSPEED, False),
    "deepscale_config": idle(DEEPSPEED),
    "deepspeed_mpi": idle(LAUNCH, False),
    "deepspeed_slurm": idle(LAUNCH, False),
    "user_script": idle(LAUNCH),
    "iteration": to("checkpoint.step"),
    "do_train": idle(DERIVED),
    "do_valid": idle(DERIVED),
    "do_test": idle(DERIVED),
    "global_num_gpus": to("parallel.gpus"),
    # Tokenizer
    "tokenizer_type": joint("tokenizer.kind", str, "GPT2BPETokenizer"),
    "padded_vocab_size": idle(DERIVED),
    "tokenizer": idle(DERIVED),
    # Training
    "data_path": to("data.path"),
    "use_shared_fs": idle("index files are built once, by the first process", True),
    "train_data_paths": joint("data.train", list),
    "train_label_data_paths": joint("data.train", list),
    "train_reward_data_paths": joint("data.train", list),
    "test_data_paths": joint("data.test", list),
    "test_label_data_paths": joint("data.test", list),
    "test_reward_data_paths": joint("data.test", list),
    "valid_data_paths": joint("data.valid", list),
    "valid_label_data_paths": joint("data.valid", list),
    "valid_reward_data_paths": joint("data.valid", list),
    "pos_train_data_paths": joint("data.train", list),
    "neg_train_data_paths": joint("data.train", list),
    "pos_train_label_data_paths": joint("data.train", list),
    "neg_train_label_data_paths": joint("data.train", list),
    "pos_valid_data_paths": joint("data.valid", list),
    "neg_valid_data_paths": joint("data.valid", list),
    "pos_valid_label_data_paths": joint("data.valid", list),
    "neg_valid_label_data_paths": joint("data.valid", list),
    "pos_test_data_paths": joint("data.test", list),
    "neg_test_data_paths": joint("data.test", list),
    "pos_test_label_data_paths": joint("data.test", list),
    "neg_test_label_data_paths": joint("data.test", list),
    "train_data_weights": joint("data.train", list),
    "valid_data_weights": joint("data.valid", list),
    "test_data_weights": joint("data.test", list),
    "weight_by_num_documents": to("data.weight_by_documents", False),
    "weighted_sampler_alpha": to("data.weight_alpha", 1.0),
    "data_impl": idle("the format is detected from the files", "infer"),
    "pack_impl": to("data.packing", "packed", lower),
    "dataset_impl": joint("data.train", str, "gpt2"),
    "train_impl": joint("train.objective", str, "normal"),
    "dpo_fp32": idle(FP32_MATH, True),
    "dpo_reference_free": joint("preference.reference_free", bool, False),
    "dpo_beta": joint("preference.beta", float, 0.1),
    "kto_fp32": idle(FP32_MATH, True),
    "kto_desirable_weight": joint("preference.desirable_weight", float, 1.0),
    "kto_undesirable_weight": joint("preference.undesirable_weight", float, 1.0),
    "z_loss": joint("train.z_loss", float, 0.0),
    "kto_beta": joint("preference.beta", float, 0.1),
    "fp32_reinforce": idle(REINFORCE, True),
    "kl_impl": idle(REINFORCE, "mse"),
    "kl_div_beta": idle(REINFORCE, 0.1),
    "reinforce_leave_one_out": idle(REINFORCE, False),
    "allow_chopped": to("data.allow_chopped", True),
    "mmap_warmup": idle("corpora are memory-mapped; the system caches them", False),
    "save": to("checkpoint.dir"),
    "s3_path": refused("checkpoints are written to a folder: copy it where it should go"),
    "s3_chunk_size": idle("nothing is uploaded", 104857600),
    "config_files": idle(DERIVED),
    "load": joint("checkpoint.resume or checkpoint.init_from", str),
    "checkpoint_validation_with_forward_pass": idle("every tensor in a checkpoint has a checksum", False),
    "checkpoint_scale": joint("checkpoint.every or checkpoint.log_base", str, "linear"),
    "checkpoint_factor": joint("checkpoint.every or checkpoint.log_base", float),
    "extra_save_iters": to("checkpoint.steps"),
    "no_save_optim": to("checkpoint.save_optimizer", False, opposite),
    "no_save_rng": idle(RANDOM, False),
    "no_load_optim": to("checkpoint.load_optimizer", False, opposite),
    "no_load_rng": idle(RANDOM, False),
    "finetune": joint("checkpoint.init_from", bool, False),
    "batch_size": idle(DERIVED),
    "train_iters": to("train.steps"),
    "train_epochs": to("train.epochs"),
    "eval_iters": to("eval.batches", 100),
    "keep_last_n_checkpoints": to("checkpoint.keep_last"),
    "eval_interval": to("eval.every", 1000, nonzero),
    "split": to("data.split", "969, 30, 1"),
    "vocab_file": to("tokenizer.path"),
    "merge_file": to("tokenizer.merges"),
    "num_workers": idle("corpora are memory-mapped; the system caches them", 2),
    "exit_interval": to("train.exit_interval"),
    "attention_dropout": to("model.attention_dropout", 0.0),
    "hidden_dropout": joint("model.hidden_dropout, model.embedding_dropout", float, 0.0),
    "weight_decay": to("optimizer.weight_decay", 0.1),
    "checkpoint_activations": to("train.recompute", False, recomputed),
    "checkpoint_num_layers": idle(RECOMPUTE, 1),
    "deepspeed_activation_checkpointing": idle(DEEPSPEED, True),
    "contiguous_checkpointing": idle(RECOMPUTE, False),
    "checkpoint_in_cpu": idle(RECOMPUTE, False),
    "synchronize_each_layer": idle(FUSION, False),
    "profile_backward": idle("a profile holds both passes", False),
    "partition_activations": idle(RECOMPUTE, False),
    "clip_grad": joint("optimizer.clip_norm", float, 1.0),
    "hysteresis": idle(LOSS_SCALE, 2),
    "dynamic_loss_scale": idle(DERIVED),
    "loss_scale": idle(LOSS_SCALE),
    "loss_scale_window": idle(LOSS_SCALE, 1000.0),
    "min_scale": idle(LOSS_SCALE, 1.0),
    "char_level_ppl": idle("evaluation always reports bits per byte", False),
    "use_mup": joint("model.mup.base_width", bool, False),
    "coord_check": idle("`castalia mup check` draws it", False),
    "save_base_shapes": idle("model.mup.base_width says what the shapes are relative to", False),
    "base_shapes_file": joint("model.mup.base_width", str),
    "mup_init_scale": joint("model.mup.init_scale", float, 1.0),
    "mup_attn_temp": joint("model.mup.attention_temperature", float, 1.0),
    "mup_output_temp": joint("model.mup.output_temperature", float, 1.0),
    "mup_embedding_mult": joint("model.mup.embedding_multiplier", float, 1.0),
    "mup_rp_embedding_mult": joint("model.mup.position_multiplier", float, 1.0),
    "mup_width_scale": idle("`castalia mup check --widths` names the widths", 2),
    # Textgen
    "text_gen_type": to("generate.mode", None, lower),
    "precompute_model_name": joint("data.train", str),
    "temperature": to("generate.temperature", 0.0),
    "top_p": to("generate.top_p", 0.0),
    "top_k": to("generate.top_k", 0),
    "return_logits": idle("`generate` writes text; load_model gives logits", False),
    "maximum_tokens": to("generate.max_tokens", 64),
    "prompt_end": to("generate.prompt_end", "\n"),
    "sample_input_file": to("generate.input_file"),
    "sample_output_file": joint("generate.output_file", str, "samples.txt"),
    "num_samples": to("generate.num_samples", 1),
    "recompute": idle("generation always uses its cache; the text is the same", False),
    "eval_results_prefix": to("eval.results_prefix", ""),
    "eval_tasks": to("eval.suite"),
    # MoE
    "moe_num_experts": joint("model.experts.count, width", int, 1),
    "moe_expert_interval": joint("model.experts.every", int, 1),
    "moe_top_k": joint("model.experts.top_k", int, 1),
    "moe_router_type": joint("model.experts.router", str, "sinkhorn"),
    "moe_lbl_in_fp32": idle(MOE_FP32, False),
    "moe_jitter_eps": joint("model.experts.jitter", float),
}
# fmt: on

# Arguments of older releases that public configs still contain; current GPT-NeoX refuses them.
FORMER: dict[str, Key] = {
    "gas": idle("a leftover of older releases: gradient_accumulation_steps is what counts"),
    "save_interval": renamed("checkpoint_factor"),
    "label_data_paths": renamed("train_label_data_paths"),
    "mlp_type": refused(
        "`llama` became activation: swiglu with mlp_multiple_of: 256, and an intermediate_size of three times the "
        "inner width",
        "regular",
    ),
    "expert_interval": idle(MOE_DEEPSPEED, 2),
    "use_tutel": idle(MOE_DEEPSPEED, False),
    "moe_loss_coeff": idle(MOE_DEEPSPEED, 0.1),
    "moe_train_capacity_factor": idle(MOE_DEEPSPEED, 1.0),
    "moe_eval_capacity_factor": idle(MOE_DEEPSPEED, 1.0),
    "moe_min_capacity": idle(MOE_DEEPSPEED, 4),
    "moe_token_dropping": idle(MOE_DEEPSPEED, False),
    "create_moe_param_group": idle(MOE_DEEPSPEED, True),
    "moe_use_residual": idle(MOE_DEEPSPEED, True),
    "moe_expert_parallel_size": idle(MOE_DEEPSPEED, 1),
    "moe_type": idle(MOE_DEEPSPEED, "megablocks"),
    "moe_glu": idle(MOE_DEEPSPEED, False),
    "enable_expert_tensor_parallelism": idle(MOE_DEEPSPEED, False),
}
