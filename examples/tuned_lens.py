"""A tuned lens: each layer's residual stream gets an affine map of its own before the model's norm and head.

    python examples/tuned_lens.py runs/first examples/kjv/kjv.jsonl --steps 200 --output lens.safetensors

The logit lens reads all layers as if they were the last one. The recipe is that of Belrose et al., "Eliciting Latent
Predictions from Transformers with the Tuned Lens" (2303.08112): for each layer a matrix and a bias, added to the
stream, which begin at zero and learn to predict what the model predicts, by the KL divergence. The model itself stays
as it is. The figures printed are these divergences in bits, of the logit lens and of the tuned one, on texts that the
lens was not trained on.
"""

# %% What to look at
import argparse
from itertools import cycle, islice
from pathlib import Path

import torch
from torch.nn import functional as F

import castalia
from castalia.data.sources import documents, find_files
from castalia.examine.residuals import residuals
from castalia.storage.lazy import InMemory
from castalia.storage.safetensors import write_safetensors

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="a run, or a checkpoint of any format")
parser.add_argument("texts", type=Path, help="a file or a folder of texts")
parser.add_argument("--steps", type=int, default=250)
parser.add_argument("--rows", type=int, default=8, help="sequences in a step")
parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
parser.add_argument("--output", type=Path, default=Path("lens.safetensors"))
options = parser.parse_args()

# %% The model and rows of tokens; one in ten is kept for judging
torch.manual_seed(0)
model = castalia.load_model(options.model).requires_grad_(False)
wanted = options.length * options.rows * min(options.steps, 500)
tokens: list[int] = []
for text in documents(find_files([options.texts])):
    tokens += model.tokenizer.encode(text)
    if len(tokens) > wanted:
        break
rows = torch.tensor(tokens[: len(tokens) // options.length * options.length]).view(-1, options.length)
judged, trained = rows[::10], rows[torch.arange(len(rows)) % 10 != 0]
assert len(judged) and len(trained), f"{options.texts} is too short: give more text, or a smaller --length"

# %% The lens: layers 0 to n - 1, since the last one predicts what the model does
width, depth = model.cfg.hidden_size, model.cfg.num_layers
matrices = torch.zeros(depth, width, width, requires_grad=True)
biases = torch.zeros(depth, width, requires_grad=True)


def divergences(batch: torch.Tensor, tuned: bool) -> torch.Tensor:
    """KL(model || lens) of each layer in nats [n], the mean over the tokens [rows, t] of a batch."""
    *streams, last = residuals(model, batch)
    target = model.logits(model.leave(last)).log_softmax(-1)
    found = []
    for layer, x in enumerate(streams):
        seen = x + F.linear(x, matrices[layer], biases[layer]) if tuned else x
        predicted = model.logits(model.leave(seen)).log_softmax(-1)
        found.append(F.kl_div(predicted, target, reduction="none", log_target=True).sum(-1).mean())
    return torch.stack(found)


# %% Training, with the paper's SGD: momentum 0.9, gradients clipped to 1, a rate that falls to 0
optimizer = torch.optim.SGD([matrices, biases], lr=1.0, momentum=0.9, nesterov=True)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, options.steps)
for batch in islice(cycle(trained[torch.randperm(len(trained))].split(options.rows)), options.steps):
    optimizer.zero_grad()
    divergences(batch, tuned=True).sum().backward()
    torch.nn.utils.clip_grad_norm_([matrices, biases], 1.0)
    optimizer.step()
    schedule.step()

# %% What it changed
with torch.no_grad():
    logit, tuned = (divergences(judged, which) / torch.log(torch.tensor(2.0)) for which in (False, True))
for layer in range(depth):
    print(
        f"layer {layer}: {logit[layer]:.3f} bits from the model by the logit lens, {tuned[layer]:.3f} by the tuned one"
    )
lens = {"matrices": InMemory(matrices), "biases": InMemory(biases)}
write_safetensors(options.output, lens, checksums=False)
print(f"wrote {options.output}")
