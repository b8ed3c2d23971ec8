"""The short form of a config's notes."""

from __future__ import annotations

from castalia.config.load import load_config
from castalia.config.notes import folded

MODEL = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "gradient_clipping": 1.0}


def test_a_few_notes_stay_as_they_are():
    notes = load_config([{**MODEL, "log_dir": "x", "num_workers": 3}]).notes
    assert len(notes) == 3
    assert folded(notes) == list(notes)


def test_many_keys_without_effect_become_one_line():
    keys = {
        "log_dir": "x",
        "num_workers": 3,
        "steps_per_print": 7,
        "zero_optimization": {"stage": 0, "overlap_comm": True},
    }
    notes = load_config([{**MODEL, **keys}, {"preference": {"loss": "ipo"}}]).notes
    clips, line = folded(notes)
    assert "gradient_clipping: 1.0 clips here" in clips
    assert line == f"{len(notes) - 1} keys without effect (castalia config check lists them)"
