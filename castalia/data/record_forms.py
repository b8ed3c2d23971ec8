"""Records for fine-tuning in the forms of other programs, each read as a text, an answer, a pair or a judged answer.

    text      {"text": "..."}
    answer    messages of {role, content} (OpenAI) or {from, value} (ShareGPT); prompt and completion (TRL), response
              or reference; question and answer; instruction, input and output (Alpaca)
    pair      chosen and rejected, with a prompt or what they have in common
    judged    an answer with a label, true or false

What is asked, and what is answered to it, are messages or strings. A prompt always comes along: where it cannot be put
before the answers, the record is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

Conversation = list[dict[str, Any]]
Kind = Literal["text", "answer", "pair", "judged"]
MESSAGES = ("messages", "conversation", "conversations")  # fields that hold a list of turns
ANSWERED = {"completion": "prompt", "response": "prompt", "reference": "prompt", "answer": "question"}  # what by what
PROMPTS = ("prompt", "question", "instruction", *MESSAGES)  # fields with what is asked before `chosen` and `rejected`
# Roles by the names of ShareGPT and of function calling.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
ROLES |= {"function_call": "assistant", "observation": "tool", "function": "tool"}
EXAMPLES: dict[Kind, str] = {
    "text": '{"text": "..."}',
    "answer": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "pair": '{"prompt": "...", "chosen": "...", "rejected": "..."}',
    "judged": '{"prompt": "...", "completion": "...", "label": true}',
}


class Talk(NamedTuple):
    """A conversation, of which the first `given` messages are not learned, and the tools that it may call."""

    messages: Conversation
    given: int = 0
    tools: tuple[Any, ...] = ()


class Passage(NamedTuple):
    """A text that continues another one: nothing of the prompt is learned."""

    prompt: str
    completion: str


Answer = Talk | Passage


def kind_of(record: Any) -> Kind:
    """What a record is. Raises ValueError, with the fields found and an example of what is taken, for anything else."""
    fields = record.keys() if isinstance(record, Mapping) else set()
    if {"chosen", "rejected"} <= fields:
        return "pair"
    answers = any({key, prompt} <= fields for key, prompt in ANSWERED.items()) or {"instruction", "output"} <= fields
    if answers or fields & set(MESSAGES):
        return "judged" if isinstance(record.get("label"), bool) else "answer"
    if "text" in fields:
        return "text"
    found = f"the fields {', '.join(fields)}" if fields else f"a {type(record).__name__}"
    raise ValueError(f"{found}, and not what one can learn from, such as {EXAMPLES['answer']} or {EXAMPLES['pair']}")


def answer_of(record: Mapping[str, Any]) -> Answer:
    """The answer of a record of the kinds "answer" and "judged". Raises ValueError for fields that hold none."""
    if key := next((name for name in MESSAGES if name in record), None):
        messages = turns(record[key], key)
        return Talk(_with_system(record, messages), 0, tools_of(record))
    if "output" in record and "instruction" in record:
        return Talk(_with_system(record, [*_history(record), *_alpaca(record)]), 0, tools_of(record))
    key = next(key for key, prompt in ANSWERED.items() if {key, prompt} <= record.keys())
    return after_prompt(record, ANSWERED[key], key)


def label_of(record: Mapping[str, Any]) -> int:
    """1 for an answer that is wanted, -1 for one that is not."""
    return 1 if record["label"] else -1


def pair_of(record: Mapping[str, Any]) -> tuple[Answer, Answer]:
    """The chosen and the rejected answer, each with what is asked. Raises ValueError for fields that hold none."""
    key = next((name for name in PROMPTS if record.get(name)), None)
    if key is not None:
        if key == "instruction" and record.get("input"):
            record = {**record, key: _alpaca(record)[0]["content"]}
        return after_prompt(record, key, "chosen"), after_prompt(record, key, "rejected")
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = _shared_text(chosen, rejected)
        return Passage(chosen[:shared], chosen[shared:]), Passage(rejected[:shared], rejected[shared:])
    sides = turns(chosen, "chosen"), turns(rejected, "rejected")
    given = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(*sides, strict=False)))
    tools = tools_of(record)
    return Talk(sides[0], given, tools), Talk(sides[1], given, tools)


def _shared_text(first: str, second: str) -> int:
    """The length of the prompt of two texts that begin alike, as TRL finds it: without a space at its end."""
    alike = zip(first, second, strict=False)
    length = sum(1 for _ in takewhile(lambda both: both[0] == both[1], alike))
    return length - 1 if length and first[length - 1] == " " else length


def after_prompt(record: Mapping[str, Any], prompt_key: str, key: str) -> Answer:
    """The answer in one field after what is asked in another one. Raises ValueError where they do not fit together."""
    prompt, answer = record[prompt_key], record[key]
    if isinstance(prompt, str) and isinstance(answer, str):
        return Passage(prompt, answer)
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else turns(answer, key)
    talk = with_prompt(prompt, said, prompt_key, key)
    messages = _with_system(record, talk.messages)
    return Talk(messages, talk.given + len(messages) - len(talk.messages), tools_of(record))


def with_prompt(prompt: Any, messages: Conversation, prompt_key: str, key: str) -> Talk:
    """The messages after those of a prompt, which is a list of messages or what a user says.

    Messages that begin with the prompt themselves stay as they are. Raises ValueError where they begin with another
    question, as one of the two would be lost.
    """
    asked = turns(prompt, prompt_key) if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
    before = list(takewhile(lambda turn: turn["role"] != "assistant", messages))
    if messages[: len(asked)] == asked:
        return Talk(messages, len(asked))
    if isinstance(prompt, str) and any(turn["content"] == prompt for turn in before):
        return Talk(messages, len(before))
    if isinstance(prompt, str) and before:
        raise ValueError(
            f"field {key!r} begins with another question than field {prompt_key!r} holds; keep the one that is meant"
        )
    return Talk([*asked, *messages], len(asked))


def _with_system(record: Mapping[str, Any], messages: Conversation) -> Conversation:
    """The messages after the record's own field `system`, unless they begin with a system message."""
    system = record.get("system")
    if not isinstance(system, str) or not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    parts = [record.get("instruction"), record.get("input")]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise ValueError("fields 'instruction' and 'input' must be text")
    asked = {"role": "user", "content": "\n\n".join(part for part in parts if part)}
    return [asked, {"role": "assistant", "content": record["output"]}] if "output" in record else [asked]


def _history(record: Mapping[str, Any]) -> Conversation:
    """Earlier turns of a record of Alpaca's form: a list of [question, answer]."""
    rows = record.get("history") or []
    if not all(isinstance(row, list) and len(row) == 2 for row in rows):
        raise ValueError("field 'history' is not a list of [question, answer]")
    return [turn for asked, said in rows for turn in (_turn("user", asked), _turn("assistant", said))]


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def turns(value: Any, key: str) -> Conversation:
    """The messages of a field, as {role, content}. Raises ValueError for anything else."""
    if isinstance(value, Mapping):
        value = [value]  # a single turn
    if not (isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value)):
        raise ValueError(f"field {key!r} is not a conversation: expected a list of {{role, content}}")
    return [_message(turn, number, key) for number, turn in enumerate(value, start=1)]


def _message(turn: Mapping[str, Any], number: int, key: str) -> dict[str, Any]:
    if "from" in turn and "value" in turn:
        turn = {"role": turn["from"], "content": turn["value"]}
    elif "content" not in turn and turn.get("tool_calls"):
        turn = {**turn, "content": ""}  # a message that only calls tools
    missing = {"role", "content"} - turn.keys()
    if missing:
        raise ValueError(f"turn {number} of {key!r} has no {' and no '.join(map(repr, sorted(missing)))}")
    return {**turn, "role": ROLES.get(str(turn["role"]), turn["role"])}


def tools_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """The tools that a record describes, in the field `tools` or `functions`: a list, or one as JSON text."""
    given = record.get("tools") or record.get("functions") or ()
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"field 'tools' is not JSON: {error}") from None
    if not isinstance(given, list | tuple):
        raise ValueError("field 'tools' is not a list")
    return tuple(given)


def tools_as_text(messages: Conversation, tools: Sequence[Any], knows: str) -> Conversation:
    """Messages for a template that does not know tools: they and their calls become text.

    `knows` is the template. What it names (`tools`, `tool_calls`) is left to it.
    """
    if "tool_calls" not in knows:
        messages = [_without_calls(turn) for turn in messages]
    if not tools or "tools" in knows:
        return messages
    described = "\n".join(["Tools:", *(json.dumps(tool, ensure_ascii=False) for tool in tools)])
    if messages[0]["role"] == "system":
        return [_turn("system", f"{_plain(messages[0]['content'])}\n\n{described}"), *messages[1:]]
    return [_turn("system", described), *messages]


def _without_calls(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with its calls as Hermes and Qwen write them."""
    calls = turn.get("tool_calls")
    if not calls:
        return turn
    parts = [_plain(turn["content"])] if turn["content"] else []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else call
        parts.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
    return {name: value for name, value in turn.items() if name != "tool_calls"} | {"content": "\n".join(parts)}


def _plain(content: Any) -> str:
    """A message's content, or the text of its parts."""
    if not isinstance(content, list):
        return str(content)
    return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
