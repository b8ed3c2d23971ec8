"""RWKV-6 token after token, written from the paper (2404.05892, sections 4 and 5), for weights under its own names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]


def _layer_norm(x, weights, name):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weights[name + ".weight"] + weights[name + ".bias"]


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _lora(x, base, down, up):
    """Equation 14: a learned vector, and what a token adds to it."""
    return base + np.tanh(x @ down) @ up


def logits(weights: Weights, tokens: list[int]) -> np.ndarray:
    """One row of logits for each token."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    heads, size = w["blocks.0.att.time_faaaa"].shape
    hidden = heads * size
    state = [[np.zeros(hidden), np.zeros(hidden), np.zeros((heads, size, size))] for _ in range(layers)]
    rows = []
    for token in tokens:
        x = _layer_norm(w["emb.weight"][token], w, "blocks.0.ln0")
        for layer in range(layers):
            own = {n.removeprefix(f"blocks.{layer}."): v for n, v in w.items() if n.startswith(f"blocks.{layer}.")}
            x = x + _time_mix(_layer_norm(x, own, "ln1"), own, state[layer], heads, size)
            x = x + _channel_mix(_layer_norm(x, own, "ln2"), own, state[layer])
        rows.append(w["head.weight"] @ _layer_norm(x, w, "ln_out"))
    return np.stack(rows)


def _time_mix(x, own, state, heads, size):
    before, state[0] = state[0], x
    change = before - x
    rank = own["att.time_maa_w2"].shape[1]
    low = np.tanh((x + change * own["att.time_maa_x"].ravel()) @ own["att.time_maa_w1"])
    seen = {}
    for number, name in enumerate("wkvrg"):
        share = own[f"att.time_maa_{name}"].ravel() + low[number * rank :][:rank] @ own["att.time_maa_w2"][number]
        seen[name] = x + change * share
    r, k, v = (own[f"att.{name}.weight"] @ seen[name[0]] for name in ("receptance", "key", "value"))
    gate = own["att.gate.weight"] @ seen["g"]
    d = _lora(seen["w"], own["att.time_decay"].ravel(), own["att.time_decay_w1"], own["att.time_decay_w2"])
    w = np.exp(-np.exp(d))
    out = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        product = np.outer(k[part], v[part])
        y = r[part] @ (state[2][head] + own["att.time_faaaa"][head][:, None] * product)
        state[2][head] = w[part][:, None] * state[2][head] + product
        out.append((y - y.mean()) / np.sqrt(y.var() + 64e-5))
    normed = np.concatenate(out) * own["att.ln_x.weight"] + own["att.ln_x.bias"]
    return own["att.output.weight"] @ (normed * gate * _sigmoid(gate))


def _channel_mix(x, own, state):
    before, state[1] = state[1], x
    change = before - x
    k = own["ffn.key.weight"] @ (x + change * own["ffn.time_maa_k"].ravel())
    r = own["ffn.receptance.weight"] @ (x + change * own["ffn.time_maa_r"].ravel())
    return _sigmoid(r) * (own["ffn.value.weight"] @ np.maximum(k, 0) ** 2)
