"""What the design page says of files is so."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text()


def test_the_core_path_is_short_and_all_of_it_exists():
    section = PAGE.partition("## The core path")[2].partition("\n## ")[0]
    files = [ROOT / "castalia" / name for name in re.findall(r"`([\w/]+\.py)`", section)]
    assert len(files) > 30
    lines = {path: len(path.read_text().splitlines()) for path in files if path.name != "schema.py"}
    assert sum(lines.values()) < 7000


def test_each_file_and_name_of_the_page_exists():
    rooms = ["", "checkpoint/", "checkpoint/formats/", "checkpoint/formats/native/"]
    for name in set(re.findall(r"[\w/]+\.py\b", PAGE)):
        assert any((ROOT / "castalia" / room / name).is_file() for room in rooms), name
    text = "".join(path.read_text() for path in (ROOT / "castalia").rglob("*.py"))
    for name in ("parallelize", "load_config", "open_samples", "build_stages", "load_parameters", "open_checkpoint"):
        assert name in PAGE
        assert re.search(rf"def {name}\b", text), name
