"""What each layer of a model predicts, over the checkpoints of its training: a logit lens of a series as a picture.

    python examples/lens_over_series.py runs/first "In the beginning God created the heaven" --output lens.png

Left, in bits: how surprised each layer is by the tokens that follow, on average, at each step. Right: what each layer
predicts after the last token. Layer 0 is what enters the first block; the last one predicts what the model does. The
cells below (# %%) run one by one in an editor that knows them; change `SERIES` and `TEXT` there.
"""

# %% What to look at
import argparse
import math
from pathlib import Path

import castalia
from castalia.examine.residuals import Lens, logit_lens
from castalia.figures import panels, plain, shades, write_picture

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("series", help="a run, or a folder with one folder for each step")
parser.add_argument("text")
parser.add_argument("--output", type=Path, default=Path("lens.png"))
options = parser.parse_args()
SERIES, TEXT, OUTPUT = options.series, options.text, options.output

# %% One lens for each checkpoint
lenses: dict[int, Lens] = {}
for member in castalia.open_series(SERIES):
    model = castalia.load_model(member.path)
    lenses[member.step] = logit_lens(model, model.tokenizer, TEXT, top=1)
steps, layers = list(lenses), len(next(iter(lenses.values())).rows)


# %% Bits of the tokens that follow
def bits(lens: Lens, layer: int) -> float:
    """The mean surprise, in bits, of a layer by the text's tokens from the second on."""
    return -sum(math.log2(max(prob, 1e-30)) for prob in lens.rows[layer].next_prob) / (len(lens.ids) - 1)


for step, lens in lenses.items():
    print(f"step {step}: " + "  ".join(f"{bits(lens, layer):.2f}" for layer in range(layers)) + "  bits, by layer")

# %% The picture
figure, (curves, grid) = panels(1, 2, size=(6 + 0.9 * len(steps), 2 + 0.45 * layers))
for layer, colour in enumerate(shades(layers)):
    curves.plot(steps, [bits(lenses[step], layer) for step in steps], color=colour, label=f"layer {layer}")
curves.set(xlabel="step", ylabel="bits per token", title="what follows, as each layer sees it")
curves.legend(fontsize=8)
plain([curves])
guesses = [[lens.rows[layer].top[-1][0] for lens in lenses.values()] for layer in reversed(range(layers))]
grid.imshow([[guess.prob for guess in row] for row in guesses], aspect="auto", cmap="Blues", vmin=0, vmax=1)
for y, row in enumerate(guesses):
    for x, guess in enumerate(row):
        ink = "white" if guess.prob > 0.6 else "black"
        grid.text(x, y, repr(guess.text)[1:-1], ha="center", va="center", fontsize=8, color=ink, parse_math=False)
grid.set(xlabel="step", ylabel="layer", title=f"after {TEXT[-40:]!r}")
grid.set_xticks(range(len(steps)), map(str, steps))
grid.set_yticks(range(layers), map(str, reversed(range(layers))))
write_picture(figure, OUTPUT)
print(f"wrote {OUTPUT}")
