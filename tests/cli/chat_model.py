"""A small chat model as a Hugging Face folder has it, which has learned two answers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, LlamaConfig, PreTrainedTokenizerFast

from castalia.data.tokenizer import train_bpe

LESSONS = {"Who was the first?": "Adam was.", "And who built it?": "Noah built the ark."}
SYSTEM = "You answer."
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
CONFIGS = {
    "llama": lambda **keys: LlamaConfig(**SHAPE, num_key_value_heads=2, **keys),
    "gpt_neox": lambda **keys: GPTNeoXConfig(**SHAPE, rotary_pct=0.5, **keys),
}


def words() -> PreTrainedTokenizerFast:
    """A byte-level vocabulary with ChatML's tokens, whose turns end with <|im_end|>; documents end otherwise."""
    engine = train_bpe([*LESSONS, *LESSONS.values(), "user assistant system"] * 4, 330).engine
    special = {"additional_special_tokens": ["<|im_start|>"], "pad_token": "<|pad|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<|im_end|>", **special)
    made.chat_template = TEMPLATE
    return made


def conversation(count: int) -> list[dict[str, str]]:
    """The system message and the first lessons."""
    turns = [
        {"role": role, "content": text}
        for question, answer in list(LESSONS.items())[:count]
        for role, text in (("user", question), ("assistant", answer))
    ]
    return [{"role": "system", "content": SYSTEM}, *turns]


def make_chat_model(folder: Path, kind: str = "llama") -> Path:
    """Write the folder. The model answers both questions one after the other, as the lessons say."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = words()
    (ids,) = tokenizer.apply_chat_template([conversation(2)], return_tensors="pt", return_dict=True)["input_ids"]
    keys = {"vocab_size": len(tokenizer) + 3, "max_position_embeddings": 160, "initializer_range": 0.1}
    config = CONFIGS[kind](**keys, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids[None], labels=ids[None]).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answers_of_transformers(folder: Path, questions: list[str], system: str | None, most: int = 24) -> list[str]:
    """What `apply_chat_template` and `generate` give for a conversation, one question after the other."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages, answers = [{"role": "system", "content": system}] if system else [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**asked, max_new_tokens=most, do_sample=False)[0, asked["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(written, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers
