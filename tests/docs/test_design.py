"""What the design page says of modules and names is true."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text()


def test_the_core_path_is_short_and_all_of_it_exists():
    section = PAGE.partition("## The core path")[2].partition("\n## ")[0]
    files = [ROOT / "castalia" / name for name in re.findall(r"`([\w/]+\.py)`", section)]
    assert len(files) > 25
    assert sum(len(path.read_text().splitlines()) for path in files) < 7300


def test_each_module_of_the_page_exists():
    rooms = ["", "checkpoint/", "checkpoint/formats/"]
    names = re.findall(r"(?<![\w./])((?:[a-z_]+/)+[a-z_]+)(?![\w/])", PAGE)
    assert len(set(names)) > 50
    for name in set(names) - {"tokens/s"}:
        places = (ROOT / "castalia" / room / name for room in rooms)
        assert any(place.is_dir() or place.with_suffix(".py").is_file() for place in places), name


def test_each_function_of_the_page_exists():
    text = "".join(path.read_text() for path in (ROOT / "castalia").rglob("*.py"))
    journeys = PAGE.partition("## The core path")[0]
    for name in ("parallelize", "load_config", "open_samples", "build_stages", "load_weights", "make_session"):
        assert name in journeys and re.search(rf"def {name}\b", text), name
    for name in ("RunConfig", "Transformer", "Samples", "Checkpoint", "Rule", "TrainStep", "Executor"):
        assert re.search(rf"class {name}\b", text), name
