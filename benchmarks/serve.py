"""The server beside `generate` in one process, on the same weights: what a token costs, and what 16 streams gain.

    OMP_NUM_THREADS=1 python benchmarks/serve.py [--new 32] [--rounds 3] [--streams 16]
    OMP_NUM_THREADS=1 python benchmarks/serve.py --soak 20
    OMP_NUM_THREADS=1 python benchmarks/serve.py --beside "transformers serve {folder} --port {port} --device cpu"
    OMP_NUM_THREADS=1 python benchmarks/serve.py --beside "python -m llama_cpp.server --model {gguf} --port {port}"

`--soak` is so many minutes at full load, with clients that leave in the middle, and prints the server's memory.
`--beside` is the command of another server with OpenAI's completions, which is told the model's Hugging Face folder or
its GGUF file of fp32; both get the same texts with the same fields, in turns. Tokens are counted as each server's usage
says, or by the pieces of one that streams none.

Weights are random, of pythia-70m's shape. The engine is asked over HTTP, with streams, by clients in another process.
Rounds take turns, and CPU seconds of the serving process are given beside wall-clock ones, since the machine may be
busy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import results
import torch

from castalia.data.tokenizer import train_bpe
from castalia.generate.generation import Sampling, stream
from castalia.generate.packed_model import pack
from castalia.plan.serve_plan import ROWS

PROMPT = 64  # tokens


def save(folder: Path) -> None:
    """A model of pythia-70m's shape with random weights, and a small vocabulary, as a Hugging Face folder."""
    import transformers

    config = transformers.GPTNeoXConfig(
        num_hidden_layers=6, hidden_size=512, num_attention_heads=8, intermediate_size=2048, vocab_size=50304,
        max_position_embeddings=2048, rotary_pct=0.25,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config)
    model.generation_config.eos_token_id = None  # so that other servers write all tokens
    train_bpe(["the server beside generate, on the same weights"], 270).save(folder)
    # All that is written is letters: no text ends early, and every token is a piece of text that a server sends.
    known = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    letters = torch.tensor([number for text, number in known.items() if text.isascii() and text.isalpha()])
    weight = model.get_output_embeddings().weight.data
    weight.copy_(torch.zeros_like(weight).index_copy(0, letters, weight[letters]))
    model.save_pretrained(folder)


async def timed(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, float, list[dict[str, Any]]]:
    """Seconds to the first event of a stream and to its end, and its events."""
    begin, first, events = time.perf_counter(), 0.0, []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - begin
                events.append(json.loads(line[6:]))
    return first, time.perf_counter() - begin, events


async def one(client: httpx.AsyncClient, prompt: list[int], new: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the last, and their number."""
    body = {
        "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True, "return_token_ids": True,
        "logit_bias": {"0": -100},
    }  # fmt: skip
    first, last, events = await timed(client, body)
    return first, last, sum(len(event["choices"][0]["token_ids"]) for event in events)


async def several(url: str, number: int, new: int, turn: int = 0) -> dict[str, float]:
    """So many streams at a time, whose prompts no other turn has."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        begin = time.perf_counter()
        prompts = [[turn % 250 + 1, *((31 * n + place) % 250 + 1 for place in range(1, PROMPT))] for n in range(number)]
        results = await asyncio.gather(*(one(client, prompt, new) for prompt in prompts))
        seconds = time.perf_counter() - begin
    tokens = sum(count for _, _, count in results)
    firsts = sorted(first for first, _, _ in results)
    token = statistics.median((last - first) / max(1, count - 1) for first, last, count in results)
    return {"rate": tokens / seconds, "first": firsts[len(firsts) // 2], "last first": firsts[-1], "token": token}


async def plain(client: httpx.AsyncClient, model: str, prompt: str, new: int) -> tuple[float, float, int]:
    """The same of a request that any server understands."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    first, last, events = await timed(client, body)
    told = [event["usage"]["completion_tokens"] for event in events if event.get("usage")]
    pieces = [event for event in events if event["choices"] and event["choices"][0].get("text")]
    return first, last, told[-1] if told else len(pieces)


async def several_plain(url: str, model: str, number: int, new: int, turn: int) -> tuple[float, float]:
    """Tokens a second of so many streams at a time, and the median time to the first token."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        begin = time.perf_counter()
        texts = [f"{turn}.{n} the server beside generate, on the same weights" for n in range(number)]
        results = await asyncio.gather(*(plain(client, model, text, new) for text in texts))
        seconds = time.perf_counter() - begin
    return sum(count for _, _, count in results) / seconds, statistics.median(first for first, _, _ in results)


def beside(folder: Path, url: str, options: argparse.Namespace) -> None:
    """Both servers in turns, with one stream and with several."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gguf = folder.parent / "model.gguf"
    if "{gguf}" in options.beside:
        words = [str(folder), str(gguf), "--to", "gguf", "--dtype", "f32"]
        subprocess.run([sys.executable, "-m", "castalia", "convert", *words], check=True)
    command = options.beside.format(folder=folder, gguf=gguf, port=port).split()
    other = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        theirs = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                httpx.get(f"{theirs}/v1/models", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        servers = {"ours": (url, folder.name), "theirs": (theirs, str(folder))}
        rows: dict[str, list[tuple[float, float]]] = {}
        for turn in range(options.rounds + 1):
            for name, (address, model) in servers.items():
                for number in (1, options.streams):
                    found = asyncio.run(several_plain(address, model, number, options.new, turn))
                    if turn:  # the first one loads and warms up
                        rows.setdefault(f"{name}, {number} streams", []).append(found)
        for name, values in rows.items():
            print(name, *(f"{statistics.median(column):.3f}" for column in zip(*values, strict=True)))
        print("columns: tokens/s, median s to the first token")
    finally:
        other.terminate()
        other.wait(30)


async def soak(url: str, pid: int, seconds: float, clients: int) -> None:
    """So many clients without a pause: streams, scores, errors, and streams that are left after some tokens."""
    end, counts = time.monotonic() + seconds, dict.fromkeys(("streams", "left", "scores", "refused"), 0)

    async def client_of(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            while time.monotonic() < end:
                prompt = [draw.randrange(1, 250) for _ in range(draw.randrange(1, 300))]
                kind = draw.choice(list(counts))
                counts[kind] += 1
                if kind == "scores":
                    (await client.post("/v1/score", json={"input": prompt})).raise_for_status()
                elif kind == "refused":
                    assert (await client.post("/v1/completions", json={"prompt": prompt, "x": 1})).status_code == 400
                else:
                    body = {"prompt": prompt, "max_tokens": draw.randrange(1, 48), "stream": True}
                    async with client.stream("POST", "/v1/completions", json=body) as answer:
                        answer.raise_for_status()
                        async for _ in answer.aiter_lines():
                            if kind == "left" and draw.random() < 0.1:
                                break

    async def watch() -> None:
        while time.monotonic() < end:
            status = Path(f"/proc/{pid}/status").read_text()
            resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
            print(
                f"{(seconds - end + time.monotonic()) / 60:.1f} min: {int(resident) / 1000:.1f} MB", counts, flush=True
            )
            await asyncio.sleep(min(60.0, seconds / 10))

    await asyncio.gather(watch(), *map(client_of, range(clients)))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--beside", metavar="COMMAND")
    results.option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save(folder)
        run(folder, options)


def measure(models: Mapping[str, Any], words: Any, url: str, pid: int, options: argparse.Namespace) -> None:
    """`generate`, one stream and several, in turns; what a token takes after the first one, and throughput.

    `models`: as `generate` packs them for one text, and as the server does.
    """
    rows: dict[str, list[float]] = {}
    turn = 0

    def served(number: int, new: int) -> tuple[dict[str, float], float]:
        nonlocal turn
        turn, used = turn + 1, cpu_seconds(pid)
        return asyncio.run(several(url, number, new, turn)), cpu_seconds(pid) - used

    def generated(name: str, new: int) -> tuple[float, float]:
        begin, used = time.perf_counter(), time.process_time()
        prompt = [[place % 250 + 1 for place in range(PROMPT)]]
        assert len(list(stream(models[name], words, prompt, Sampling(max_tokens=new)))) == new
        return time.perf_counter() - begin, time.process_time() - used

    for _ in range(options.rounds):
        after, round_of = options.new - 1, {}
        for name in models:
            long, short = generated(name, options.new), generated(name, 1)
            round_of[f"{name}, ms a token after the first"] = 1e3 * (long[0] - short[0]) / after
            round_of[f"{name}, CPU ms"] = 1e3 * (long[1] - short[1]) / after
        (one, cpu), (_, first) = served(1, options.new), served(1, 1)
        many, cpu_many = served(options.streams, options.new)
        round_of |= {
            "serve 1 stream, ms a token after the first": 1e3 * one["token"],
            "serve 1 stream, CPU ms": 1e3 * (cpu - first) / after,
            "serve 1 stream, CPU ms a token with the prompt": 1e3 * cpu / options.new,
            "serve 1 stream, tokens/s with the prompt": one["rate"],
            "serve 1 stream, s to the first token": one["first"],
            f"serve {options.streams} streams, tokens/s with the prompts": many["rate"],
            f"serve {options.streams} streams, CPU ms a token with the prompts": 1e3
            * cpu_many
            / options.streams
            / options.new,
            f"serve {options.streams} streams, median s to the first token": many["first"],
            f"serve {options.streams} streams, last s to the first token": many["last first"],
        }
        for name, value in round_of.items():
            rows.setdefault(name, []).append(value)
    for kind in ("ms a token after the first", "CPU ms"):
        for name in models:
            pairs = zip(rows[f"{name}, {kind}"], rows[f"serve 1 stream, {kind}"], strict=True)
            rows[f"overhead over {name}, {kind}"] = [b - a for a, b in pairs]
    one, many = "serve 1 stream", f"serve {options.streams} streams"
    rates = zip(rows[f"{one}, tokens/s with the prompt"], rows[f"{many}, tokens/s with the prompts"], strict=True)
    costs = zip(
        rows[f"{one}, CPU ms a token with the prompt"], rows[f"{many}, CPU ms a token with the prompts"], strict=True
    )
    rows[f"{options.streams} streams over one, tokens/s"] = [b / a for a, b in rates]
    rows[f"{options.streams} streams over one, tokens per CPU second"] = [a / b for a, b in costs]
    for name, values in rows.items():
        print(f"{name:62} {statistics.median(values):8.3f}   " + " ".join(f"{value:.3f}" for value in values))
        if "CPU ms" in name and "over" not in name:
            results.record(name, [value / 1e3 for value in values], "cpu")


def run(folder: Path, options: argparse.Namespace) -> None:
    from castalia.language_model import load_model
    from castalia.loading import tokenizer_at

    words = tokenizer_at(folder)
    words.end_ids = frozenset()  # so that all tokens are written; the server's texts have a bias against the end
    models = {"generate": load_model(folder), "generate, packed alike": load_model(folder)}
    pack(models["generate"])
    pack(models["generate, packed alike"], rows=ROWS)
    command = [sys.executable, "-m", "castalia", "serve", str(folder), "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = next(word for word in server.stdout.readline().split() if word.startswith("http")).rstrip(":")
        asyncio.run(several(url, 2, 2))  # loads the model
        if options.soak:
            asyncio.run(soak(url, server.pid, 60 * options.soak, 2 * options.streams))
            return
        if options.beside:
            beside(folder, url, options)
            return
        measure(models, words, url, server.pid, options)
    finally:
        server.kill()


if __name__ == "__main__":
    main()
