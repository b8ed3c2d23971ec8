"""Which of PyTorch's kernels computes attention, for the model, the planner and `castalia doctor`.

The rules are those of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and sdp_utils_cpp.h in torch 2.11 to 2.15,
with three decisions of our own for GPUs:

* An attention bias is never given to cuDNN, whose backward pass returns NaN for some biases (pytorch issue 196678) and
  which misread boolean masks (issue 177842). The memory-efficient kernel takes it.
* Generation never uses cuDNN, which builds a plan for each number of keys, and that number grows with every token.
* Grouped-query attention in the memory-efficient kernel repeats keys and values for each query head, because the
  kernel supports no groups before torch 2.14 and the plain kernel would materialize all scores.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from castalia.config.schema import ModelConfig

Kernel = Literal["flash", "cuDNN", "memory-efficient", "plain"]
# What a query attends to. "causal": keys up to its own position, with as many queries as keys; "last causal": the same
# where the queries are the last of the keys; "bias": whatever a bias that is added to the scores leaves.
Sight = Literal["everything", "causal", "last causal", "bias"]
Capability = tuple[int, int]  # CUDA compute capability: (8, 0) is an A100

LARGEST_FLASH_HEAD = 256
LARGEST_CUDNN_HEAD = 128  # newer cuDNN takes some larger heads, but with no less memory than flash
AMPERE: Capability = (8, 0)


class KernelChoice(NamedTuple):
    """A kernel and how it is called."""

    kernel: Kernel
    sight: Sight  # as requested, or "bias" where the kernel needs a bias to express it
    why: str = ""  # why it is neither flash nor cuDNN
    repeats: bool = False  # keys and values are copied for each query head of their group


def choose_kernel(
    capability: Capability | None,
    dtype: str,
    sight: Sight,
    *,
    head_size: int,
    grouped: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    writing: bool = False,
    cudnn: bool = True,
    capped: bool = False,
) -> KernelChoice:
    """The kernel for one attention layer.

    `capability`: of the GPU, None for a CPU. `dtype`: "bf16", "fp16", "fp32" or another. `dropout`: of the attention
    weights, 0 outside of training. `training`: a backward pass follows. `writing`: generation, where every call has
    more keys. `cudnn`: torch prefers cuDNN on devices that suit it. `capped`: scores have a soft cap.
    """
    if capped:  # `castalia.model.attention.capped_attention`, which groups queries itself
        return KernelChoice("plain", sight, "no fused kernel caps scores")
    expressed: Sight = "bias" if sight == "last causal" else sight
    if capability is None:
        no_flash = "CPUs' flash kernel has no dropout" if dropout else ""
        return KernelChoice("plain" if no_flash else "flash", expressed, no_flash)
    if not (why_not_flash := _why_not_flash(capability, dtype, sight, head_size, dropout, training)):
        # torch prefers cuDNN on Hopper and Blackwell data-centre GPUs only.
        suits = capability[0] in (9, 10) and head_size <= LARGEST_CUDNN_HEAD and head_size % 8 == 0
        able = sight == "causal" or (sight == "everything" and not dropout)
        if suits and able and cudnn and not writing:
            return KernelChoice("cuDNN", sight)
        return KernelChoice("flash", sight)
    if why_not_efficient := _why_not_efficient(capability, dtype, head_size):
        return KernelChoice(
            "plain", expressed, f"{why_not_flash}, and for the memory-efficient kernel {why_not_efficient}"
        )
    return KernelChoice("memory-efficient", expressed, why_not_flash, repeats=grouped)


def reasons_for_bias(cfg: ModelConfig, window: int | None, keys: int, documents: bool) -> list[str]:
    """Which properties of blocks with this window, for so many keys, and of the data only a bias can express."""
    reasons = {
        "ALiBi's distances": cfg.position == "alibi",
        f"a window of {window} tokens": window is not None and keys > window + 1,
        "documents that do not see each other": documents,
    }
    return [name for name, needed in reasons.items() if needed]


def training_choice(
    cfg: ModelConfig,
    capability: Capability | None,
    dtype: str,
    length: int,
    *,
    documents: bool = False,
    gathers: bool = False,
    cudnn: bool = True,
) -> KernelChoice:
    """The kernel of a training step with sequences of `length` tokens.

    `documents`: they attend only within themselves. `gathers`: this is the last of several context-parallel ranks,
    which holds the last queries of a sequence and gathers all keys.
    """
    bias = reasons_for_bias(cfg, cfg.window, length, documents)
    return choose_kernel(
        capability,
        dtype,
        "bias" if bias else "last causal" if gathers else "causal",
        head_size=cfg.head_size,
        grouped=cfg.kv_heads < cfg.num_heads,
        dropout=cfg.attention_dropout,
        training=True,
        cudnn=cudnn,
        capped=cfg.attention_softcap is not None,
    )


def _why_not_flash(
    capability: Capability, dtype: str, sight: Sight, head_size: int, dropout: float, training: bool
) -> str:
    small = (8, 6) <= capability <= (8, 9) or capability[0] == 12  # consumer GPUs, with less shared memory
    reasons = {
        "flash takes no mask": sight == "bias",
        "flash needs 16-bit compute": dtype not in ("bf16", "fp16"),
        "flash needs a GPU of compute capability 8.0 or newer": capability < AMPERE,
        f"heads of {head_size} are too large for flash": head_size > LARGEST_FLASH_HEAD
        or (small and training and head_size > 192 and (dropout > 0 or head_size <= 224)),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def _why_not_efficient(capability: Capability, dtype: str, head_size: int) -> str:
    if dtype not in ("bf16", "fp16", "fp32") or (dtype == "bf16" and capability < AMPERE):
        return f"{dtype} is not among its types here"
    multiple = 8 if dtype != "fp32" else 4 if capability >= AMPERE else 1
    return f"heads of {head_size} are not a multiple of {multiple}" if head_size % multiple else ""
