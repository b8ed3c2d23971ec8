"""Commands run in forks of one process that has imported everything, so that a kill costs a tenth of a second.

with Stage() as stage:
    done = stage.run(["train", "config.yml"], folder, how="kill", number=17)
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from tests.ports import free_port

MODULES = (
    "castalia.cli.main", "castalia.cli.train", "castalia.cli.finetune", "castalia.cli.convert",
    "castalia.cli.merge_lora", "castalia.cli.data", "castalia.cli.tokenizer", "castalia.cli.diff",
    "castalia.cli.plot", "castalia.cli.evaluate", "castalia.train.loop", "castalia.evaluate.perplexity",
    "castalia.checkpoint.convert", "castalia.examine.diff", "castalia.examine.verify",
    "castalia.checkpoint.formats.huggingface.write", "castalia.checkpoint.formats.neox.write",
    "castalia.checkpoint.formats.native.write", "castalia.checkpoint.formats.peft.write",
    "castalia.generate.generation", "castalia.parallel.mesh_executor", "castalia.data.prepare", "castalia.data.corpora",
    "tests.attacks.disk", "tokenizers", "jinja2", "matplotlib.pyplot", "plotext", "torch.distributed", "rich.progress",
)  # fmt: skip
PATIENCE_S = 240.0


class Done(NamedTuple):
    """`code`: of the ranks' exit codes the lowest if one is negative, for the signal that killed it, else the highest.
    `operations`: of the attacked rank, as (kind, path), where it was not killed. `codes`: of all ranks."""

    code: int
    said: str
    operations: list[tuple[str, str]]
    codes: list[int]

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Stage:
    def __enter__(self) -> Stage:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.stage"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, words: Sequence[str], folder: Path, *attack: Any, **settings: Any) -> Done:
        """`castalia WORDS` in the folder. What follows is as in `together`."""
        (done,) = self.together([words], folder, *attack, **settings)
        return done

    def together(
        self, commands: Sequence[Sequence[str]], folder: Path, how: str = "", number: int | None = None,
        ranks: int = 1, rank: int = 0, job: str = "", keep: str = "",
    ) -> list[Done]:  # fmt: skip
        """Several commands that begin at one moment, each on so many ranks, of which `rank` has the disk that fails.

        `job`: the scheduler's, in which they run. `keep`: see `Disk`.
        """
        assert self.process.stdin and self.process.stdout
        wanted = {"commands": [list(words) for words in commands], "folder": str(folder), "how": how, "number": number}
        self.process.stdin.write(json.dumps(wanted | {"ranks": ranks, "rank": rank, "job": job, "keep": keep}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the stage has died with exit code {self.process.wait()}"
        return [
            Done(code, said, [(kind, path) for kind, path in each], codes)
            for code, said, each, codes in json.loads(answer)
        ]


def main() -> None:
    """Answers each line of standard input."""
    from importlib import import_module

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in MODULES:
        import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        answers.write(json.dumps(_act(**json.loads(line))) + "\n")
        answers.flush()


def _act(commands: list[list[str]], **settings: Any) -> list[list[Any]]:
    children = [_begin(words, **settings) for words in commands]
    return [_finish(*child) for child in children]


def _begin(words: list[str], folder: str, ranks: int, **attack: Any) -> tuple[list[int], str]:
    notes = tempfile.mkdtemp()
    port, numbers = free_port(), []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        number = os.fork()
        if number == 0:
            os.setpgid(0, numbers[0] if numbers else 0)
            _play(words, folder, notes, place | {"MASTER_ADDR": "127.0.0.1"} if ranks > 1 else {}, rank, **attack)
        numbers.append(number)
        with suppress(PermissionError, ProcessLookupError):  # it was faster
            os.setpgid(number, numbers[0])
    return numbers, notes


def poison(number: int) -> None:
    """From the n-th module on that computes, nothing is a number, on this rank alone."""
    from torch import Tensor
    from torch.nn.modules.module import register_module_forward_hook

    calls = count(1)

    def poisoned(module: Any, inputs: Any, output: Any) -> Any:
        is_value = isinstance(output, Tensor) and output.is_floating_point()
        return output * float("nan") if is_value and next(calls) >= number else output

    register_module_forward_hook(poisoned)


def starve(megabytes: int) -> None:
    """This process may take no more memory than so much beyond what it has."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (megabytes << 20), resource.RLIM_INFINITY))


TROUBLES = {"nan": poison, "memory": starve}  # that are not the disk's


def _finish(numbers: list[int], notes: str) -> list[Any]:
    """When a rank is killed, so are the others, as if the machine had gone; and a stopped one, when the others end."""
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE_S
    while len(codes) < len(numbers):
        for number in numbers:
            if number in codes:
                continue
            found, status = os.waitpid(number, os.WNOHANG)
            if found:
                codes[number] = os.waitstatus_to_exitcode(status)
        killed, last = any(code < 0 for code in codes.values()), set(numbers) - set(codes)
        if killed or time.monotonic() > end or (len(numbers) > 1 and len(last) == 1 and is_stopped(*last)):
            for number in set(numbers) - set(codes):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.002)
    said = Path(notes, "said").read_text(errors="replace")
    operations = Path(notes, "operations")
    found = json.loads(operations.read_text()) if operations.exists() else []
    subprocess.run(["rm", "-r", notes], check=True)
    each = [codes[number] for number in numbers]
    return [min(each) if min(each) < 0 else max(each), said, found, each]


def is_stopped(number: int) -> bool:
    """Whether a process has got SIGSTOP."""
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _play(
    words: list[str], folder: str, notes: str, place: dict[str, Any], own: int, how: str, number: int | None, rank: int,
    job: str, keep: str,
) -> None:  # fmt: skip
    """In the child, which does not return."""
    from castalia.cli.main import main as castalia
    from tests.attacks.disk import Disk

    code = 1
    try:
        os.environ.update({name: str(value) for name, value in place.items()} | ({"SLURM_JOB_ID": job} if job else {}))
        os.chdir(folder)
        said = os.open(f"{notes}/said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = ["castalia", *words]
        if how in TROUBLES and own == rank:
            TROUBLES[how](number or 0)
            number = None
        disk = Disk(Path(folder), how, number, keep)
        if own == rank:
            disk.attach()
        try:
            castalia()
            code = 0
        except SystemExit as end:
            _, most = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if own == rank:
            if code == 0:
                disk.end()
            with disk.real_open(f"{notes}/operations", "w") as file:
                json.dump(disk.operations, file)
    except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
