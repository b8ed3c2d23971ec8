import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.config.schema import DataConfig, RunConfig, Source, TokenizerConfig, TrainConfig
from castalia.data.chat import Chat, encode_chat, read_template, renderer
from castalia.data.config_corpora import open_data
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.indexed import open_dataset
from castalia.data.prepare import Recipe, prepare
from castalia.data.tokenizer import ByteTokenizer, train_bpe
from castalia.errors import DataError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
QUESTION, ANSWER = {"role": "user", "content": "how?"}, {"role": "assistant", "content": "so."}
BYTES = TokenizerConfig(kind="bytes")


def spell(ids: list[int]) -> str:
    """Ids of the byte tokenizer, masked ones as _, the end of a document as $."""
    return "".join("_" if i == -100 else "$" if i == 256 else chr(i) for i in ids)


@pytest.mark.parametrize(
    ("options", "messages", "text", "labels"),
    [
        ({}, [QUESTION, ANSWER], "<u>how?\n<a>so.\n$", "___________so.\n$"),
        ({}, [QUESTION, ANSWER] * 2, "<u>how?\n<a>so.\n" * 2 + "$", "___________so.\n" * 2 + "$"),
        ({"only_last": True}, [QUESTION, ANSWER] * 2, "<u>how?\n<a>so.\n" * 2 + "$", "_" * 26 + "so.\n$"),
        ({}, [QUESTION, ANSWER, QUESTION], "<u>how?\n<a>so.\n<u>how?\n$", "___________so.\n" + "_" * 9),
        ({"for_rm": True}, [QUESTION, ANSWER], "<u>how?\n<a>so.\n$$", "_" * 16 + "$"),
    ],
)
def test_what_of_a_conversation_is_learned(options: dict, messages: list, text: str, labels: str) -> None:
    ids, learned = encode_chat(messages, Chat(TEMPLATE, **options), ByteTokenizer("bytes"))
    assert (spell(ids), spell(learned)) == (text, labels)


def test_a_template_must_add_turn_by_turn() -> None:
    with pytest.raises(ValueError, match="turn 2 changes the tokens"):  # TEMPLATE asks with <a>, whoever is to answer
        encode_chat([ANSWER, QUESTION], Chat(TEMPLATE, role="user"), ByteTokenizer("bytes"))


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=6)), min_size=1))
def test_labels_are_the_ids_of_the_answers(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    if not any(role == "assistant" for role, _ in turns):
        with pytest.raises(ValueError, match="without an answer"):
            encode_chat(messages, Chat(template), ByteTokenizer("bytes"))
        return
    ids, labels = encode_chat(messages, Chat(template), ByteTokenizer("bytes"))
    ends_with_answer = turns[-1][0] == "assistant"
    parts = [(role == "assistant", f"[{content}]".encode()) for role, content in turns] + [(ends_with_answer, [256])]
    assert ids == [i for _, part in parts for i in part]
    assert labels == [i if learned else -100 for learned, part in parts for i in part]


def test_equal_to_transformers(fixtures: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from castalia.data.tokenizer import load_tokenizer

    template = (
        "{{ bos_token }}{% for m in messages %}\n    {% if loop.first and m.role == 'user' %}Q{% endif %}\n"
        "    {{ m.content | trim | tojson }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    (tmp_path / "tokenizer.json").write_bytes((fixtures / "tokenizer" / "20B_tokenizer.json").read_bytes())
    settings = {"bos_token": {"content": "<|endoftext|>"}, "chat_template": [{"name": "default", "template": template}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    messages = [{"role": "user", "content": " Wie schön? "}, {"role": "assistant", "content": "So.\n"}]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|endoftext|>", chat_template=template
    )
    chat = Chat(*read_template(tmp_path))
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    whole = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    asked = theirs.apply_chat_template(messages[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert whole[: len(asked)] != asked  # the second turn stands where the first one asked: no turn-by-turn template
    with pytest.raises(ValueError, match="turn 2 changes the tokens"):
        encode_chat(messages, chat, tokenizer)
    steady = Chat(template.replace("{% if add_generation_prompt %}A:{% endif %}", ""), chat.names)
    theirs.chat_template = steady.template
    ids, labels = encode_chat(messages, steady, tokenizer)
    asked = theirs.apply_chat_template(messages[:1], tokenize=True, return_dict=False)
    whole = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == [*whole, 0] and labels == [-100] * len(asked) + whole[len(asked) :] + [0]


@pytest.mark.parametrize("behind", ["", "\n"])
def test_an_end_that_the_template_writes_is_not_doubled(behind: str) -> None:
    tokenizer = train_bpe(["a"], 270)
    end = "<|endoftext|>" + behind
    template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    question, answer = (tokenizer.encode_batch([text], bare=True)[0] for text in ("how?" + end, "so." + end))
    messages = [QUESTION, ANSWER]
    assert encode_chat(messages, Chat(template), tokenizer) == (question + answer, [-100] * len(question) + answer)
    messages.append(QUESTION)
    assert encode_chat(messages, Chat(template.replace(end, end + "!")), tokenizer)[0][-2:] == [
        *tokenizer.encode("!"),
        0,
    ]


def records(path: Path, *conversations: object) -> Path:
    path.write_text("".join(json.dumps({"conversation": found}) + "\n" for found in conversations))
    return path


def test_prepared_conversations_are_sampled_with_their_labels(tmp_path: Path) -> None:
    source = records(tmp_path / "chat.jsonl", *([QUESTION, {**ANSWER, "content": f"{i}"}] for i in range(50)))
    recipe = Recipe(BYTES, keys=("conversation",), chat=Chat(TEMPLATE))
    report = prepare([source], tmp_path / "x", recipe)
    prefix, labels = report.outputs
    assert labels.endswith("x_conversation_label_document") and report.documents == 50
    assert open_dataset(prefix).dtype == open_dataset(labels).dtype == np.int32
    run = RunConfig(
        data=DataConfig(
            train=(Source(path=prefix, labels=labels),),
            seq_length=32,
            packing="pack_until_overflow",
            mask_documents=True,
            cache_dir=str(tmp_path),
        ),
        train=TrainConfig(steps=3, batch_size=4),
    )
    batch = open_data(run).batch(0)
    assert all(spell(row[row >= 0].tolist()).replace("\n$", "").isdigit() for row in batch.labels)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([QUESTION], "without an answer"),
        ("hello", "is not a conversation"),
        ([{"role": "user"}], "turn 1 of 'conversation' has no 'content'"),
        ([{"role": "user", "content": "boo"}, ANSWER], "does not render: no boo"),
        ([{"role": "user", "content": "\ud800"}, ANSWER], "half of a surrogate pair"),
    ],
)
def test_bad_conversations(tmp_path: Path, conversation: object, message: str) -> None:
    source = records(tmp_path / "chat.jsonl", [QUESTION, ANSWER], conversation)
    template = "{% if messages[0].content == 'boo' %}{{ raise_exception('no boo') }}{% endif %}" + TEMPLATE
    recipe = Recipe(BYTES, keys=("conversation",), chat=Chat(template))
    with pytest.raises(DataError, match=rf"chat\.jsonl:2: .*{message}"):
        prepare([source], tmp_path / "x", recipe)
    report = prepare([source], tmp_path / "x", Recipe(BYTES, ("conversation",), skip_bad=True, chat=Chat(template)))
    assert report.documents == 1 and message in report.bad[0]


def test_bad_templates(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    for path, message in [(tmp_path, "no chat template in"), (tmp_path / "broken.json", "broken.json is damaged")]:
        with pytest.raises(DataError, match=message):
            read_template(path)
    source = records(tmp_path / "chat.jsonl", [QUESTION, ANSWER])
    with pytest.raises(DataError, match="not valid Jinja: line 1"):
        prepare([source], tmp_path / "x", Recipe(BYTES, ("conversation",), chat=Chat("{% for %}")))


def test_answers_beyond_the_context_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = {"role": "user", "content": "why " * 30}
    source = records(
        tmp_path / "chat.jsonl", [long, ANSWER], [QUESTION, {**ANSWER, "content": "so " * 30}], [QUESTION, ANSWER]
    )
    prefix, labels = prepare([source], tmp_path / "x", Recipe(BYTES, ("conversation",), chat=Chat(TEMPLATE))).outputs
    run = RunConfig(
        data=DataConfig(train=(Source(path=prefix, labels=labels),), seq_length=40, packing="unpacked"),
        train=TrainConfig(steps=2, batch_size=1),
    )
    open_data(run)
    assert "of 3 documents 1 are left out" in caplog.text and "1 are cut there" in caplog.text


def test_pairs_and_judged_conversations(tmp_path: Path) -> None:
    other = {**ANSWER, "content": "no."}
    pairs = [{"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, other]}] * 3
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = Recipe(BYTES, ("chosen", "rejected"), chat=Chat(TEMPLATE))
    _, _, rejected, rejected_labels = prepare([path], tmp_path / "p", recipe).outputs
    assert spell(open_dataset(rejected)[2].tolist()) == "<u>how?\n<a>no.\n$"
    assert spell(open_dataset(rejected_labels)[0].tolist()) == "___________no.\n$"
    path.write_text("".join(json.dumps({"text": [QUESTION, ANSWER], "good": good}) + "\n" for good in (True, -0.5, 2)))
    judged = Recipe(BYTES, ("text",), chat=Chat(TEMPLATE), reward="good")
    _, _, rewards = prepare([path], tmp_path / "j", judged).outputs
    assert [item.tolist() for item in open_dataset(rewards)] == [[1], [-1], [1]]
    path.write_text(json.dumps({"text": [QUESTION, ANSWER], "good": "yes"}) + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .*'good' judges nothing: .* not 'yes'"):
        prepare([path], tmp_path / "b", judged)


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ("how?", "<u>how?\n"),  # a user's words
        ([QUESTION], "<u>how?\n"),
        ([QUESTION, {**ANSWER, "content": "hm."}, QUESTION], "<u>how?\n<a>hm.\n<u>how?\n"),  # no answer to learn
        (None, ""),
    ],
)
def test_answers_follow_the_prompt_beside_them(tmp_path: Path, prompt: object, before: str) -> None:
    record = {"prompt": prompt, "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "no."}]}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(record) + "\n")
    recipe = Recipe(BYTES, ("chosen", "rejected"), chat=Chat(TEMPLATE))
    chosen, chosen_labels, rejected, rejected_labels = prepare([path], tmp_path / "p", recipe).outputs
    for texts, labels, answer in ((chosen, chosen_labels, "so."), (rejected, rejected_labels, "no.")):
        assert spell(open_dataset(texts)[0].tolist()) == f"{before}<a>{answer}\n$"
        learned = "_" * len(before + "<a>") if before else "<a>"
        assert spell(open_dataset(labels)[0].tolist()) == f"{learned}{answer}\n$"


def test_editing_the_labels_of_a_prompt_changes_nothing(tmp_path: Path) -> None:
    """Loss and gradients come from the answers alone; an edit of one answer's label is felt."""
    torch = pytest.importorskip("torch", reason="needs torch")
    from castalia.config.schema import ModelConfig
    from castalia.model.init import initialize
    from castalia.model.transformer import Transformer

    source = records(tmp_path / "chat.jsonl", *([QUESTION, {**ANSWER, "content": f"{i}"}] * 2 for i in range(8)))
    texts, labels = prepare([source], tmp_path / "x", Recipe(BYTES, ("conversation",), chat=Chat(TEMPLATE))).outputs
    model = Transformer(cfg := ModelConfig(num_layers=1, hidden_size=16, num_heads=2, vocab_size=257))
    initialize(model, cfg, 1)

    def step(prefix: str) -> tuple:
        data = {"train": [{"path": texts, "labels": prefix}], "seq_length": 64, "packing": "pack_until_overflow"}
        run = RunConfig(
            data=DataConfig(**data, mask_documents=True, cache_dir=str(tmp_path)),
            train=TrainConfig(steps=2, batch_size=4),
        )
        arrays = (torch.from_numpy(a) for a in open_data(run).batch(0)[:4])
        tokens, targets, _, documents = arrays
        loss, count = model(tokens, targets, documents=documents)
        return loss.item(), int(count), [g.norm().item() for g in torch.autograd.grad(loss, list(model.parameters()))]

    def edited(name: str, change) -> str:
        with DatasetWriter(tmp_path / name, "i4") as writer:
            for item in open_dataset(labels):
                writer.add(change(item))
        return str(tmp_path / name)

    before = step(labels)
    assert step(edited("prompts", lambda item: np.where(item < 0, -7, item))) == before
    assert step(edited("answers", lambda item: np.where(item == ord("\n"), ord("?"), item)))[0] != before[0]


TURNS = [{"role": "system", "content": "be brief"}, QUESTION, ANSWER]
STRICT = (
    "{% if messages | length == 1 and messages[0].role == 'system' %}{{ raise_exception('a system message alone') }}"
    "{% endif %}" + TEMPLATE
)
PARTS = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"


def test_a_template_may_refuse_a_system_message_alone() -> None:
    ids, labels = encode_chat(TURNS, Chat(STRICT), ByteTokenizer("bytes"))
    assert spell(ids) == "<s>be brief\n<u>how?\n<a>so.\n$" and spell(labels).strip("_") == "so.\n$"


def test_a_template_may_mark_what_is_generated() -> None:
    template = (
        "{% for m in messages %}<{{ m.role[0] }}>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}!{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    talk, words = [*TURNS, QUESTION, ANSWER], ByteTokenizer("bytes")
    ids, labels = encode_chat(talk, Chat(template), words)
    assert spell(ids) == "<s>be brief<u>how?<a>so.!<u>how?<a>so.!$"
    assert [part for part in spell(labels).split("_") if part] == ["so.!", "so.!$"]
    last = spell(encode_chat(talk, Chat(template, only_last=True), words)[1])
    assert [part for part in last.split("_") if part] == ["so.!$"]


@pytest.mark.parametrize(
    ("content", "template", "text"),
    [
        (None, TEMPLATE, "<a>\n"),
        (None, "{% for m in messages %}{{ m.content | trim }}|{% endfor %}", "|"),
        (None, "{% for m in messages %}{{ 'null' if m.content is none else m.content }}{% endfor %}", "null"),
        ([{"type": "text", "text": "so"}, " it is"], TEMPLATE, "<a>so it is\n"),
        ([{"type": "text", "text": "so"}], PARTS, "so"),
    ],
)
def test_content_that_is_no_text(content: object, template: str, text: str) -> None:
    assert renderer(Chat(template))([{"role": "assistant", "content": content}], False).text == text


def test_parts_that_are_no_text_are_refused() -> None:
    with pytest.raises(ValueError, match="a part of type 'image'"):
        encode_chat([{"role": "assistant", "content": [{"type": "image"}]}], Chat(TEMPLATE), ByteTokenizer("bytes"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ range(10 ** 9) | list }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages[9].content.x }}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ 9 ** 99999999 }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ '%99999999999d' % 1 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% endfor %}",
    ],
)
def test_what_does_not_render_is_one_line_within_bounds(template: str) -> None:
    with pytest.raises(ValueError, match=r"^the chat template does not render: [^\n]+$"):
        renderer(Chat(template))([QUESTION], False)


def test_a_damaged_tokenizer_config_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json is damaged"):
        read_template(tmp_path)
