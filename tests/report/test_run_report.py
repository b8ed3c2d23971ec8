import json
import re
import shutil
import subprocess
import sys

import pytest

from castalia.errors import CastaliaError
from castalia.report.report_text import WIDTH, lines
from castalia.report.run_report import REASONS, write_report
from castalia.strict_json import to_json


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """The report of a run beside itself under another name, and its page."""
    other, page = shutil.copytree(run, tmp_path_factory.mktemp("other") / "other"), run.parent / "out" / "page.html"
    (run / REASONS).write_text(json.dumps({"model": "as small as can be"}))
    return write_report(run, page, others=[str(other)], reasons={"batch": "for a test"}), page.read_text()


def test_the_model_stands_beside_compressors_unigrams_and_another_run(written):
    report, _ = written
    bars = {bar.name.partition(" (")[0]: bar.bits_per_byte for bar in report.bars}
    own, other = (next(bar for bar in report.bars if bar.kind == kind) for kind in ("this run", "run"))
    assert own.bits_per_byte == report.score.bits_per_byte
    assert other.bits_per_byte == pytest.approx(own.bits_per_byte, rel=0.02)  # it predicts the first token of b, too
    assert bars["unigram of bytes"] < bars["unigram of tokens"] < 8
    assert 0 < bars["gzip -9"] < bars["unigram of bytes"]
    assert [bar.bits_per_byte for bar in report.bars] == sorted(bars.values())


def test_each_source_has_its_figures_and_together_they_are_the_whole(written):
    report, _ = written
    assert sorted(source.name for source in report.sources) == ["a", "b"]
    sizes = sum(source.bytes for source in report.sources)
    bits = sum(source.bytes * source.bits_per_byte for source in report.sources)
    assert bits / sizes == pytest.approx(report.score.bits_per_byte)


def test_samples_come_at_three_temperatures_and_are_compared_with_all_training_text(written, corpora):
    report, _ = written
    assert {sample.temperature for sample in report.samples} == {0.5, 0.8, 1.0}
    assert report.search.tokens == report.search.of_tokens > 4000


def test_reasons_come_from_the_folder_and_from_the_caller(written):
    why = {row.what: row.why for row in written[0].rows}
    assert (why["model"], why["batch"]) == ("as small as can be", "for a test")
    assert "passes over" in why["trained on"]


def test_the_page_is_whole_and_refers_to_nothing_outside(written):
    report, page = written
    assert not re.findall(r"""\b(?:src|href)\s*=\s*["'](?!#)""", page)
    assert "http" not in page and "url(" not in page.replace("url(#", "") and "@import" not in page
    assert page.count("<svg") == page.count("</svg>") == 1
    assert '<meta name="viewport"' in page and report.sentence in page


def test_the_text_fits_and_the_json_holds_it_all(written):
    report, _ = written
    shown = list(lines(report, colored=False))
    assert max(len(line) for line in "\n".join(shown).split("\n") if "castalia" not in line) <= WIDTH
    found = json.loads(to_json(report.as_json()))
    assert found["score"]["bits_per_byte"] == report.score.bits_per_byte
    assert [record["step"] for record in found["curves"]["run"]] == list(range(1, 13))
    assert found["samples"][0]["temperature"] == 0.5 and found["next"][0]["command"].startswith("castalia generate")


def test_another_text_is_judged_as_far_as_it_goes(run, tmp_path):
    (tmp_path / "my.txt").write_text("There was light and it was good. " * 9)
    report = write_report(run / "checkpoints" / "step_000012", data=str(tmp_path / "my.txt"))
    assert report.held_out.endswith("my.txt") and report.sources == ()
    assert any("whether the model was trained on it is not known" in note for note in report.notes)


@pytest.mark.slow
def test_the_commands_that_lead_on_work(run, tmp_path):
    """But for the one that a text of the user's is needed for."""
    copy = shutil.copytree(run, tmp_path / "run")
    (tmp_path / "my.txt").write_text("There was light and it was good. " * 9)
    for step in write_report(copy).next:
        command = step.command.replace("my.jsonl", "examples.jsonl").replace("my.txt", str(tmp_path / "my.txt"))
        (tmp_path / "examples.jsonl").write_text('{"text": "There was light, and it was good."}\n' * 20)
        words = command.replace("castalia ", f"{sys.executable} -m castalia ", 1)
        done = subprocess.run(words, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_what_is_no_checkpoint_is_one_error(tmp_path):
    with pytest.raises(CastaliaError, match="does not look like a checkpoint"):
        write_report(tmp_path)
