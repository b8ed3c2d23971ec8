"""A streamed command that is interrupted in the middle of its passes ends at once and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

MANY = "1000000"  # tokens: it would write for minutes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_nothing_is_left(sent: signal.Signals, code: int, fixtures: Path, tmp_path: Path) -> None:
    """Keys and values are in a scratch file: the budget is the smallest that works."""
    model = fixtures / "neox" / "pp1-mp2-z0-fp32-rotary-par" / "checkpoint"
    line = [sys.executable, "-m", "castalia", "generate", str(model), "--prompt", "In the", "--max-tokens", MANY]
    line += ["--tokenizer", str(fixtures / "neox" / "data" / "tok.json"), "--dtype", "fp32", "--memory"]
    refused = subprocess.run([*line, "1MB"], capture_output=True, text=True)
    least = " ".join(refused.stderr.split()).rpartition("--memory ")[2]
    places = {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*line, least], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | places, start_new_session=True
    )
    assert process.stdout
    assert process.stdout.read(8)  # in the middle of the text
    process.send_signal(sent)
    _, told = process.communicate(timeout=120)
    assert process.returncode == code
    assert b"Traceback" not in told
    assert not any(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):  # no process of its group lives on
        os.killpg(process.pid, 0)
