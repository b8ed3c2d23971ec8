"""Which of PyTorch's kernels computes attention. The model, the planner and `castalia doctor` ask here.

The rules are those of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and sdp_utils_cpp.h in torch 2.11 to 2.15,
with three decisions of our own for GPUs:

* A bias never goes to cuDNN, whose backward pass makes NaN of some (pytorch issue 196678), and which read boolean
  masks wrongly (issue 177842). It goes to the memory-efficient kernel.
* Writing text never takes cuDNN: it prepares a plan for each new number of keys, and there is a new one every token.
* Grouped heads are given to the memory-efficient kernel with keys and values repeated, because before torch 2.14 it
  takes no groups, and the plain kernel would make all scores.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from castalia.config.schema import ModelConfig

Kernel = Literal["flash", "cuDNN", "memory-efficient", "plain"]
# What a query sees: everything; what is not behind it, where queries are all keys, or the last of them; what a bias,
# which is added to the scores, leaves.
Sight = Literal["everything", "causal", "last causal", "bias"]
Capability = tuple[int, int]  # of a CUDA device: (8, 0) is an A100

LARGEST_FLASH_HEAD = 256
LARGEST_CUDNN_HEAD = 128  # newer versions take some larger ones, which need as much memory as with flash
AMPERE: Capability = (8, 0)


class Choice(NamedTuple):
    kernel: Kernel
    sight: Sight  # as wanted, or "bias" where only a bias tells the kernel
    why: str = ""  # the kernel is not flash or cuDNN
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
) -> Choice:
    """The kernel for one layer.

    `capability`: of the GPU, None for a CPU; `dtype`: bf16, fp16, fp32 or another; `dropout`: of the attention weights,
    0 outside of training; `training`: a backward pass follows; `writing`: there are more keys with every call; `cudnn`:
    torch prefers cuDNN on devices that it suits.
    """
    told: Sight = "bias" if sight == "last causal" else sight
    if capability is None:
        return Choice("plain", told, "CPUs' flash kernel has no dropout") if dropout else Choice("flash", told)
    if not (why_not_flash := _why_not_flash(capability, dtype, sight, head_size, dropout, training)):
        suits = capability[0] in (9, 10) and head_size <= LARGEST_CUDNN_HEAD and head_size % 8 == 0
        able = sight == "causal" or (sight == "everything" and not dropout)
        if suits and able and cudnn and not writing:
            return Choice("cuDNN", sight)
        return Choice("flash", sight)
    if why_not_efficient := _why_not_efficient(capability, dtype, head_size):
        return Choice("plain", told, f"{why_not_flash}, and for the memory-efficient kernel {why_not_efficient}")
    return Choice("memory-efficient", told, why_not_flash, repeats=grouped)


def reasons_for_bias(cfg: ModelConfig, keys: int, documents: bool) -> list[str]:
    """What of a model that sees so many keys, and of its data, only a bias can say."""
    reasons = {
        "ALiBi's distances": cfg.position == "alibi",
        f"a window of {cfg.sliding_window} tokens": cfg.sliding_window is not None and keys > cfg.sliding_window + 1,
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
) -> Choice:
    """What a training step does with sequences of that length; `gathers`: on the last of several context ranks."""
    bias = reasons_for_bias(cfg, length, documents)
    return choose_kernel(
        capability,
        dtype,
        "bias" if bias else "last causal" if gathers else "causal",
        head_size=cfg.head_size,
        grouped=cfg.kv_heads < cfg.num_heads,
        dropout=cfg.attention_dropout,
        training=True,
        cudnn=cudnn,
    )


def _why_not_flash(
    capability: Capability, dtype: str, sight: Sight, head_size: int, dropout: float, training: bool
) -> str:
    small = (8, 6) <= capability <= (8, 9) or capability[0] == 12  # devices with little shared memory
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
    return f"heads of {head_size} are no multiple of {multiple}" if head_size % multiple else ""
