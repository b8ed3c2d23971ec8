"""The command line as a whole: every verb answers, errors are one message, light verbs stay light."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from castalia.cli import main as cli

PLAIN = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "160"}


def castalia(*args: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "castalia", *args]
    return subprocess.run(command, capture_output=True, text=True, env=PLAIN, timeout=120, **options)


def python(code: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=PLAIN, timeout=120)


def test_help_lists_every_verb_with_its_line():
    result = castalia("--help")
    assert result.returncode == 0
    for verb, (_, line) in cli.VERBS.items():
        assert verb in result.stdout and line in result.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["castalia", verb, "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert f"Usage: castalia {verb}" in capsys.readouterr().out


def test_help_keeps_brackets_and_whole_lines(capsys, monkeypatch):
    for words, told in [
        (("finetune",), "rank of the adapters [default: 16]"),
        (("data", "prepare"), "the one that a record has [default: text]"),
        (("data", "batch"), "without a terminal they stand in [[double brackets]]."),
        (("data",), "lengths, dtype, largest id and how its first document begins."),
    ]:
        monkeypatch.setattr(sys, "argv", ["castalia", *words, "--help"])
        with pytest.raises(SystemExit):
            cli.main()
        assert told in " ".join(capsys.readouterr().out.split())  # however its lines are broken


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_file_defines_one_command_or_a_group_with_described_commands(verb):
    module = import_module(cli.VERBS[verb][0])
    assert hasattr(module, "app") != hasattr(module, "command")
    commands = (
        [command.callback for command in module.app.registered_commands] if hasattr(module, "app") else [module.command]
    )
    assert all(command.__doc__ for command in commands)


def test_no_verb_file_is_forgotten():
    files = [path.stem for path in Path(cli.__file__).parent.glob("*.py") if path.stem not in ("__init__", "main")]
    modules = [import_module(f"castalia.cli.{name}") for name in files]
    verbs = {module.__name__ for module in modules if hasattr(module, "app") or hasattr(module, "command")}
    assert verbs == {module for module, _ in cli.VERBS.values()}


def test_version():
    import torch

    from castalia import __version__

    first, second = castalia("--version").stdout.splitlines()
    assert first == f"castalia {__version__}"
    assert second.startswith(f"torch {torch.__version__} on ") and "; Python 3." in second


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("castalia con", {"config", "convert"}),
        ("castalia data pre", {"prepare"}),
        ("castalia convert --to g", {"gguf"}),
        ("castalia plan --sugg", {"--suggest"}),
    ],
)
def test_the_shell_completes(typed, offered, monkeypatch, capsys):
    monkeypatch.setenv("_CASTALIA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    monkeypatch.setattr("sys.argv", ["castalia"])
    with pytest.raises(SystemExit):
        cli.main()
    assert set(capsys.readouterr().out.split()) == offered


@pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_segments_grow_unless_the_user_says_otherwise(given, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    cli.growing_segments()
    found = {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    assert found == ({given: "max_split_size_mb:64"} if given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_the_allocator_is_told_before_torch_is_imported():
    code = "import sys; from castalia.cli import main; main.growing_segments(); print('torch' in sys.modules)"
    assert python(code).stdout == "False\n"


@pytest.mark.gpu
def test_segments_grow_on_a_gpu():
    code = "from castalia.cli import main; main.growing_segments(); import torch; torch.ones(1, device='cuda'); "
    assert python(code + "print(torch.cuda.memory_snapshot()[0]['is_expandable'])").stdout == "True\n"


def test_unknown_verb_gets_a_suggestion():
    result = castalia("trian")
    assert result.returncode == 2
    assert "trian" in result.stderr and "train" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "raised", ["castalia.errors.DataError('corpus.bin: torn')", "FileNotFoundError(2, 'torn', 'corpus.bin')"]
)
def test_user_errors_are_one_message_and_exit_2(raised):
    result = run_a_verb_that_raises(raised)
    assert (result.returncode, result.stderr) == (2, "error: corpus.bin: torn\n")


def test_our_own_mistakes_keep_their_traceback():
    result = run_a_verb_that_raises("ZeroDivisionError()")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_what_modules_warn_of_is_wrapped_and_errors_keep_their_traceback():
    code = (
        "import logging, sys; from castalia.cli import main as cli; sys.argv = ['castalia', '--version']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "log = logging.getLogger('castalia.data.made'); log.warning('%s: %d words', 'a b ' * 30, 3); log.info('no')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError as error: log.error('failed', exc_info=error)\n"
    )
    lines = python(code).stderr.splitlines()
    assert lines[0].startswith("warning: a b ") and lines[1].startswith("  ") and lines[1].endswith(": 3 words")
    assert lines[2] == "failed" and lines[-1] == "ZeroDivisionError: division by zero" and "no" not in lines


def test_interrupt_is_quiet():
    result = run_a_verb_that_raises("KeyboardInterrupt()")
    assert (result.returncode, result.stderr) == (128 + signal.SIGINT, "")


def run_a_verb_that_raises(expression: str) -> subprocess.CompletedProcess:
    return python(
        f"""
import sys, types, castalia.errors
from castalia.cli import main as cli
def command():
    "Raises."
    raise {expression}
sys.modules["raising"] = types.SimpleNamespace(command=command)
cli.VERBS["raising"] = ("raising", "Raises.")
sys.argv = ["castalia", "raising"]
cli.main()
"""
    )


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "castalia", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=PLAIN,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)


HEAVY = ("torch", "transformers", "matplotlib")
MIDDLING = ("numpy", "pydantic", "yaml")  # a tenth of a second each
REPORT = f"""
import sys
from castalia.cli import main as cli
try:
    cli.main()
finally:
    print("HEAVY", *[name for name in {HEAVY + MIDDLING} if name in sys.modules])
"""


@pytest.mark.parametrize(
    "args",
    [["--help"], ["plan", "pythia-14m"], ["config", "show", "pythia-14m"], *[[verb, "--help"] for verb in cli.VERBS]],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(args):
    result = python(REPORT, *args)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.splitlines()[-1].split()[1:]).isdisjoint(HEAVY)


def test_the_list_of_verbs_imports_no_library_but_its_own():
    assert python(REPORT, "--help").stdout.splitlines()[-1] == "HEAVY"


def test_a_rank_imports_no_more_than_it_needs():
    code = """
import sys
import castalia.train.dry_run, castalia.train.loop
print([name for name in ("sympy", "torch._dynamo") if name in sys.modules])  # of the compiler, and of ranks
import castalia.parallel.mesh_executor
heavy = "transformers matplotlib rich httpx aiohttp"
print([name for name in heavy.split() if name in sys.modules])
"""
    assert python(code).stdout == "[]\n[]\n"


def test_importing_castalia_loads_neither_torch_nor_numpy_nor_pydantic():
    code = "import castalia, sys; print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    assert python(code).stdout == "[]\n"


def test_public_names_stay_what_they_are_whatever_is_imported():
    code = """
import castalia, pkgutil, importlib
before = {name: getattr(castalia, name) for name in castalia.__all__}
for module in pkgutil.iter_modules(castalia.__path__, "castalia."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert all(getattr(castalia, name) is value for name, value in before.items())
"""
    assert python(code).returncode == 0
