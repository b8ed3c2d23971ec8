"""Commands and options of other programs are answered with today's."""

from __future__ import annotations

import pytest
from click import Command

from castalia.cli.habits import OPTIONS, refuse_habits
from castalia.cli.main import VERBS
from castalia.config.lora_names import key_of_others
from castalia.errors import ConfigError
from tests.cli.test_help import commands

HABITS = [
    ("train -d configs 125M.yml local_setup.yml", "no option -d: there is no folder of configs: give whole paths"),
    ("data prepare --input=a.jsonl --output-prefix b", "no option --input: files and folders are plain arguments"),
    ("preprocess_data.py --input a.jsonl", "today it is: castalia data prepare FILE"),
    ("tools/ckpts/convert_neox_to_hf.py", "today it is: castalia convert SRC DST --to hf --verify"),
    ("eval runs/a --eval_tasks lambada", "it is called --tasks"),
    ("train run.yml --learning_rate 1e-4", "optimizer.lr=3e-4"),
    ("finetune model chat.jsonl --lora-alpha=32", "no option --lora-alpha: it is called finetune.lora.alpha"),
    ("finetune model chat.jsonl --init_lora_weights pissa", "merge there (merge_and_unload)"),
    ("finetune model chat.jsonl --use-dora", "DoRA's magnitudes beside the adapters are not built in"),
]


@pytest.mark.parametrize(("line", "message"), HABITS)
def test_habits_are_answered(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        refuse_habits(line.split(), list(VERBS))
    assert message in str(error.value)


@pytest.mark.parametrize(("verb", "command"), [pytest.param(*pair, id=pair[0]) for pair in commands()])
def test_no_option_of_ours_is_taken_for_a_habit(verb: str, command: Command) -> None:
    names = {name for parameter in command.params for name in parameter.opts}
    assert not names & OPTIONS.keys() and not [name for name in names if key_of_others(name[2:])]
    refuse_habits([*verb.split(), "run.yml", "optimizer.lr=1e-3"], list(VERBS))
