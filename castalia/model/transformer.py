"""One model class for the GPT-NeoX, GPT-2 and Llama families, which differ in their configuration only.

Parameter names and shapes are an interface: initial values, conversion rules and native checkpoints depend on them,
and `castalia.config.tensor_table` has a row for each. Shapes: V padded vocabulary, h hidden size, n heads, kv key/value
heads, d head size, f width of the MLP or of an expert, e experts, b sequences, t tokens.

    embed.weight [V, h]                        positions.weight [max_positions, h] (learned positions only)
    blocks.{i}.norm1.weight, .bias [h]         blocks.{i}.norm2.weight, .bias [h] (absent with a shared norm)
    blocks.{i}.norm1_out.weight, .bias [h]     blocks.{i}.norm2_out.weight, .bias [h] (norms after attention and MLP)
    blocks.{i}.attn.qkv.weight [(n + 2 kv) d, h], .bias        rows: for each kv head its queries, its key, its value
    blocks.{i}.attn.out.weight [h, n d], .bias                 blocks.{i}.attn.qk_norm.weight, .bias [n, d]
    blocks.{i}.attn.q_norm.weight, .bias [d or n d]            blocks.{i}.attn.k_norm.weight, .bias [d or kv d]
    blocks.{i}.mlp.up.weight [f, h], .bias     blocks.{i}.mlp.gate.weight [f, h], .bias (gated only)
    blocks.{i}.mlp.router.weight [e, h]        blocks.{i}.mlp.experts.up, .gate, .down [e, f, h] (in place of an MLP)
    blocks.{i}.mlp.down.weight [h, f], .bias   norm.weight, .bias [h]
    head.weight [V, h] (absent when tied), .bias [V] (only some models)
    blocks.{i}.gmlp.*, .mamba.*, .rwkv.* (see `gmlp.py`, `mamba.py`, `rwkv.py`; in place of attention and MLP)
    embed_norm.weight, .bias [h] (only some models)
    reward.weight [1, h] (reward models, which have no other head)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.config.attention_kernels import KernelChoice, Sight, choose_kernel, reasons_for_bias
from castalia.config.schema import ModelConfig, MuPConfig
from castalia.errors import ConfigError
from castalia.model.attention import (
    DTYPE_NAMES,
    Attention,
    Cache,
    Context,
    capability,
    prefers_cudnn,
    without_cudnn,
)
from castalia.model.experts import ExpertMLP
from castalia.model.gmlp import GatedBlock
from castalia.model.kept_tokens import Kept, spread, taken
from castalia.model.layers import MLP, Embedding, Linear, is_slow_half, linear
from castalia.model.loss import IGNORE, capped, linear_cross_entropy, token_losses
from castalia.model.mamba import MambaBlock
from castalia.model.norms import LayerNorm, build_norm
from castalia.model.positions import Alibi, Rotary, Rotation, positions_in_documents, score_bias, sinusoids, visible
from castalia.model.rwkv import RWKVBlock


class Block(nn.Module):
    """Attention and MLP around the residual stream, one after the other or side by side."""

    def __init__(self, cfg: ModelConfig, layer: int, exact: bool = False) -> None:
        super().__init__()
        self.parallel, self.dropout = cfg.parallel_residual, cfg.hidden_dropout
        has_experts = cfg.layer_kinds[layer] == "moe"
        # GPT-NeoX adds the attention branch together with the MLP's bias, so without a bias the branch is lost.
        self.drops_attention = exact and cfg.parallel_residual and (has_experts or not cfg.mlp_bias)
        before, after = cfg.norm_placement != "after", cfg.norm_placement != "before"
        self.norm1: nn.Module | None = build_norm(cfg) if before else None
        self.attn = Attention(cfg, layer)
        self.norm1_out: nn.Module | None = build_norm(cfg) if after else None
        self.norm2: nn.Module | None = build_norm(cfg) if before and not cfg.has_one_norm else None
        self.mlp: nn.Module = ExpertMLP(cfg, exact) if has_experts else MLP(cfg)
        self.norm2_out: nn.Module | None = build_norm(cfg) if after else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Residual stream [b, t, h] -> the same shape, but for what of kept tokens the last block leaves out.

        sequential (GPT-2, Llama)        parallel (GPT-NeoX)

            x                                x
            |---------+                      |---------+-----------+
            |       norm1                    |       norm1       norm2, or with a shared norm
            |       attn                     |       attn         mlp   the output of norm1
            +<--------+                      +<--------+-----------+
            |---------+                      |
            |       norm2                    x
            |        mlp
            +<--------+
            |
            x

        Norms may stand after attn and mlp as well, or instead.
        """
        normed = x if self.norm1 is None else self.norm1(x)
        heads = None if self.drops_attention else self.attn(normed, context)
        if context.last and context.kept:
            x, normed = (taken(part, context.kept.places) for part in (x, normed))
        if heads is not None and self.norm1_out is not None:
            heads = self.norm1_out(heads)
        attended = torch.zeros_like(x) if heads is None else self.drop(heads)
        if not self.parallel:
            normed = x = x + attended
        if self.norm2 is not None:
            normed = self.norm2(x)
        out = self.mlp(normed)
        out = self.drop(out if self.norm2_out is None else self.norm2_out(out))
        return x + (attended + out) if self.parallel else x + out

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of a branch, before it is added to the residual stream."""
        return F.dropout(x, self.dropout) if self.training else x


def build_block(cfg: ModelConfig, layer: int, exact: bool = False) -> nn.Module:
    """The block of a layer, by its kind. All take the residual stream [b, t, h] and the `Context`."""
    if cfg.layer_kinds[layer] in ("gmlp", "amlp"):
        return GatedBlock(cfg, layer)
    if cfg.layer_kinds[layer] == "mamba":
        return MambaBlock(cfg, layer)
    if cfg.layer_kinds[layer] == "rwkv":
        return RWKVBlock(cfg, layer, exact)
    return Block(cfg, layer, exact)


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head. Parameters are left unset: `init.initialize` or a checkpoint fills them.

    A pipeline stage is an instance of this class, too, whose blocks of other stages are deleted and whose `norm` and
    `head` are None on all stages but the last. All but the first stage take the hidden state [b, t, h] in place of
    tokens; a stage without `norm` returns the hidden state.
    """

    calls_at_once = 1  # how many calls `hidden_each` takes through the model together

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        compute_dtype: torch.dtype | None = None,
        exact: bool = False,
        z_loss: float = 0.0,
    ) -> None:
        """`compute_dtype`: dtype of the activations; None: that of the parameters.

        `exact`: reproduce the defects of GPT-NeoX that change numbers. `z_loss`: see `linear_cross_entropy`; it is part
        of the loss in training mode only.
        """
        super().__init__()
        self.cfg, self.compute_dtype, self.exact, self.z_loss = cfg, compute_dtype, exact, z_loss
        self.cache_dtype: torch.dtype | None = None  # of keys and values in a KV cache; None: that in which they come
        self.embed = Embedding(cfg.padded_vocab_size, cfg.hidden_size)
        self.positions = _learned_positions(cfg) if cfg.position == "learned" else None
        self.embed_norm = LayerNorm(cfg.hidden_size, cfg.norm_eps) if cfg.embedding_norm else None
        self.windows_differ = 0 < cfg.windowed_share < 1
        # A dict, so that blocks keep their numbers when a pipeline stage deletes others.
        self.blocks = nn.ModuleDict({str(i): build_block(cfg, i, exact) for i in range(cfg.num_layers)})
        self.norm = build_norm(cfg)
        headless = cfg.tie_embeddings or cfg.reward_head
        self.head = None if headless else Linear(cfg.hidden_size, cfg.padded_vocab_size, cfg.head_bias)
        self.reward = Linear(cfg.hidden_size, 1, bias=False) if cfg.reward_head else None
        # Both act in attention alone.
        self.rotary = Rotary(cfg) if cfg.position == "rotary" and cfg.attention_layers else None
        self.alibi = Alibi(cfg.num_heads) if cfg.position == "alibi" and cfg.attention_layers else None
        self.loss, self.token_losses = linear_cross_entropy, token_losses  # replaced by tensor parallelism

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        per_sequence: bool = False,
        answers: Tensor | None = None,
        kept: Kept | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [b, t, V] of `tokens` [b, t]; with `labels` [b, t] the fp32 sum of the losses and their number.

        Labels of -100 have no loss. `cache` supplies the keys and values of other tokens and takes in these.
        `documents` [b, t] numbers documents: tokens attend within their own, and positions restart in each.
        `positions` [b or 1, t] overrides the position at which a token is embedded. With `per_sequence` the result is
        one fp32 value for each sequence [b]: the log-probability of all its labels, or from a reward model the reward
        at its last label. With `answers` [b, t], a mask of labels, it is two values [b, 2]: the log-probability of
        those in the mask, and of all. `kept`: the tokens that have an effect on the labels' losses, without a cache.
        """
        x = self.hidden(tokens, cache=cache, positions=positions, documents=documents, kept=kept)
        if self.norm is None:  # a pipeline stage that is not the last
            return x
        return self.finish(x, labels, per_sequence=per_sequence, answers=answers)

    def finish(
        self, x: Tensor, labels: Tensor | None = None, *, per_sequence: bool = False, answers: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What `forward` gives, from the final hidden state [b, t, h]."""
        if labels is None:
            return self.logits(x)
        if per_sequence:  # the only use that a reward model has for labels
            if self.reward:
                return self.reward_at(x, labels)
            log_probs = -self.losses_at(x, labels)  # [b, t]
            return (
                log_probs.sum(1)
                if answers is None
                else torch.stack([(log_probs * answers).sum(1), log_probs.sum(1)], 1)
            )
        self.refuse_tokens_of_a_reward_model()
        return self.total_loss(x, labels, self.z_loss if self.training else 0.0)

    def total_loss(self, x: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        """`linear_cross_entropy` of the final hidden state [b, t, h] with this model's head."""
        return self.loss(*self.scored(x), labels, z_loss=z_loss, cap=self.cfg.logit_softcap)

    def losses_at(self, x: Tensor, labels: Tensor) -> Tensor:
        """`token_losses` of the final hidden state [b, t, h] with this model's head: [b, t]."""
        return self.token_losses(*self.scored(x), labels, cap=self.cfg.logit_softcap)

    def scored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the losses multiply: hidden state and head. A bias is a further column, of a hidden value that is 1."""
        weight = self.head_weight
        if self.head is None or self.head.bias is None:
            return x, weight
        return torch.cat((x, torch.ones_like(x[..., :1])), -1), torch.cat((weight, self.head.bias[:, None]), 1)

    def hidden(
        self,
        tokens: Tensor,
        *,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """The final hidden state [b, t, h], for callers that need the logits of some tokens only: see `logits`.

        Arguments are those of `forward`. With `kept` it is 0 where there is no label.
        """
        x, context = self.enter(tokens, cache=cache, positions=positions, documents=documents, kept=kept)
        blocks = list(self.blocks.values())  # of a pipeline stage none, it may be
        with self.kernels(x, cache):
            for block in blocks:
                x = block(x, context._replace(last=True) if kept is not None and block is blocks[-1] else context)
        x = self.leave(x, cache)
        return x if kept is None else spread(x, kept.labelled, kept.shape)

    def hidden_each(self, calls: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> Iterator[Tensor]:
        """`hidden` of several (tokens, arguments), one after another.

        A model whose blocks are read from disk takes all of them through each block instead.
        """
        return (self.hidden(tokens, **arguments) for tokens, arguments in calls)

    def enter(
        self,
        tokens: Tensor,
        *,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor, Context]:
        """The residual stream [b, t, h] before the first block, of kept tokens [1, m, h], and what all blocks share."""
        t = tokens.shape[1]
        # The place of a token in its sequence decides which keys it sees; `positions` decide how it is embedded.
        places = torch.arange(t, device=tokens.device)[None] if cache is None else cache.reserve(t)
        if positions is None:
            positions = places if documents is None else positions_in_documents(documents)
            end = t if cache is None else cache.end
        else:
            end = int(positions.max()) + 1
        x = tokens if tokens.is_floating_point() else self.embedded(tokens, positions, end)  # [b, t, h]
        rotary = None if self.rotary is None else self.rotary(positions, end, x.dtype)
        context = self.context(x, rotary, places, documents, cache)
        return (x, context) if kept is None else (taken(x, kept.tokens), context._replace(kept=kept))

    def kernels(self, x: Tensor, cache: Cache | None) -> AbstractContextManager[None]:
        """A context in which the blocks run: it keeps torch from kernels that `choice` has ruled out."""
        return without_cudnn() if cache is not None and cache.grows and x.is_cuda else nullcontext()

    def leave(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """The final hidden state from the residual stream [b, t, h] after the last block. The cache takes note."""
        if cache is not None:
            cache.advance(x.shape[1])
        if self.norm is None:
            return x
        x = self.norm(x)
        # muP: products with the head grow with the width, so logits are divided by its ratio to the base width.
        return x / (self.cfg.width_multiplier * self.cfg.mup.output_temperature) if self.cfg.mup else x

    def embedded(self, tokens: Tensor, positions: Tensor, end: int) -> Tensor:
        """Embeddings [b, t, h] in the compute dtype. Raises ConfigError if learned positions end before `end`."""
        if self.positions is not None and end > (limit := self.positions.num_embeddings - self.cfg.position_offset):
            raise ConfigError(f"a sequence of {end} tokens is longer than model.max_positions={limit}")
        x = self.embed(tokens).to(self.compute_dtype or self.embed.weight.dtype)
        if self.cfg.embedding_multiplier != 1.0:  # rounded to the compute dtype, as in Gemma
            x = x * torch.tensor(self.cfg.embedding_multiplier, dtype=x.dtype).item()
        mup = self.cfg.mup or MuPConfig()
        if self.positions is not None:
            x = x + self.positions(positions + self.cfg.position_offset).to(x.dtype) * mup.position_multiplier
        if self.cfg.position == "sinusoidal":
            x = x + sinusoids(positions, self.cfg.hidden_size).to(x.dtype) * mup.position_multiplier
        if mup.embedding_multiplier != 1.0:
            x = x * mup.embedding_multiplier
        x = F.dropout(x, self.cfg.embedding_dropout, self.training)
        return x if self.embed_norm is None else self.embed_norm(x)

    def context(
        self,
        x: Tensor,
        rotary: Rotation | None,
        places: Tensor,
        documents: Tensor | None,
        cache: Cache | None,
    ) -> Context:
        """The kernel and the mask of all blocks. A bias is built, once for all of them, only if no kernel can do
        without.
        """
        if documents is not None and self.cfg.other_kinds:
            raise ConfigError(f"{' and '.join(self.cfg.other_kinds)} blocks cannot keep documents apart")
        if not self.cfg.attention_layers:
            return Context(cache=cache)
        t = places.shape[1]
        # A single new token sees all keys; a whole sequence is plainly causal; the last of several keys are in between.
        keys, gaps = (places, False) if cache is None else (cache.keys, cache.gaps)
        plain: Sight = "everything" if t == 1 else "causal" if t == keys.shape[1] else "last causal"

        def within(window: int | None) -> tuple[KernelChoice, Tensor | None]:
            """Kernel and bias of blocks with this window."""
            biased = gaps or reasons_for_bias(self.cfg, window, keys.shape[1], documents is not None)
            choice = self.choice(x, "bias" if biased else plain, cache)
            if choice.sight != "bias":
                return choice, None
            seen = visible(places, keys, window)
            if documents is not None:  # [b, 1, t, 1] == [b, 1, 1, t]
                seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
            dtype = torch.float32 if is_slow_half(x) else x.dtype
            return choice, score_bias(places, keys, seen, self.alibi, dtype)

        return Context(rotary, *within(self.cfg.window), within(None) if self.windows_differ else None, cache)

    def choice(self, x: Tensor, sight: Sight, cache: Cache | None) -> KernelChoice:
        """The attention kernel of all blocks, for hidden states with the dtype and device of x."""
        return choose_kernel(
            capability(x.device),
            DTYPE_NAMES.get(x.dtype, str(x.dtype)),
            sight,
            head_size=self.cfg.head_size,
            grouped=self.cfg.kv_heads < self.cfg.num_heads,
            dropout=self.cfg.attention_dropout if self.training else 0.0,
            training=torch.is_grad_enabled(),
            writing=cache is not None and cache.grows,
            cudnn=prefers_cudnn(x.device),
            capped=self.cfg.attention_softcap is not None,
        )

    def reward_at(self, x: Tensor, labels: Tensor) -> Tensor:
        """The fp32 reward [b] of each sequence, read at the token that predicts its last label."""
        assert self.reward is not None
        # Positions grow, so the largest product lies at the last label; -100 labels give 0.
        last = ((labels != IGNORE) * torch.arange(1, labels.shape[1] + 1, device=labels.device)).argmax(dim=1)
        return self.reward(x[torch.arange(len(x), device=x.device), last])[:, 0].float()  # [b, h] -> [b, 1] -> [b]

    def logits(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., V]. Raises ConfigError for a reward model."""
        self.refuse_tokens_of_a_reward_model()
        return capped(linear(x, self.head_weight) if self.head is None else self.head(x), self.cfg.logit_softcap)

    def refuse_tokens_of_a_reward_model(self) -> None:
        """Raises ConfigError if the model predicts no tokens."""
        if self.reward is not None:
            raise ConfigError("this is a reward model: it judges texts and predicts no tokens")

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, h] with its adapter, or the embedding if they are tied."""
        return self.embed.weight if self.head is None else self.head.whole_weight


def _learned_positions(cfg: ModelConfig) -> Embedding:
    if cfg.max_positions is None:
        raise ConfigError("model.position=learned needs model.max_positions, the number of positions to learn")
    return Embedding(cfg.max_positions + cfg.position_offset, cfg.hidden_size)
