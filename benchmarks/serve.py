"""The server beside `generate` in one process, on the same weights: what a token costs, and what 16 streams gain.

    OMP_NUM_THREADS=1 python benchmarks/serve.py [--new 32] [--rounds 3] [--streams 16]
    OMP_NUM_THREADS=1 python benchmarks/serve.py --soak 20

`--soak` is so many minutes at full load, with clients that leave in the middle, and prints the server's memory.

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
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import torch

from castalia.data.tokenizer import train_bpe
from castalia.generate.generation import Sampling, stream
from castalia.generate.packed_model import pack

PROMPT = 64  # tokens


def save(folder: Path) -> None:
    """A model of pythia-70m's shape with random weights, and a small vocabulary, as a Hugging Face folder."""
    import transformers

    config = transformers.GPTNeoXConfig(
        num_hidden_layers=6, hidden_size=512, num_attention_heads=8, intermediate_size=2048, vocab_size=50304,
        max_position_embeddings=2048, rotary_pct=0.25,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    train_bpe(["the server beside generate, on the same weights"], 270).save(folder)


async def one(client: httpx.AsyncClient, prompt: list[int], new: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the last, and their number."""
    body = {
        "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True, "return_token_ids": True,
        "logit_bias": {"0": -100},
    }  # fmt: skip
    begin, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - begin
                count += len(json.loads(line[6:])["choices"][0]["token_ids"])
    return first, time.perf_counter() - begin, count


async def several(url: str, number: int, new: int) -> dict[str, float]:
    """So many streams at a time."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        begin = time.perf_counter()
        prompts = [[(31 * n + place) % 250 + 1 for place in range(PROMPT)] for n in range(number)]
        results = await asyncio.gather(*(one(client, prompt, new) for prompt in prompts))
        seconds = time.perf_counter() - begin
    tokens = sum(count for _, _, count in results)
    firsts = sorted(first for first, _, _ in results)
    token = statistics.median((last - first) / max(1, count - 1) for first, last, count in results)
    return {"rate": tokens / seconds, "first": firsts[len(firsts) // 2], "last first": firsts[-1], "token": token}


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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save(folder)
        run(folder, options)


def run(folder: Path, options: argparse.Namespace) -> None:
    from castalia.loading import load_model, tokenizer_at

    words = tokenizer_at(folder)
    words.end_ids = frozenset()  # so that all tokens are written; the server's texts have a bias against the end
    model = load_model(folder)
    pack(model)
    command = [sys.executable, "-m", "castalia", "serve", str(folder), "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = next(word for word in server.stdout.readline().split() if word.startswith("http")).rstrip(":")
        asyncio.run(several(url, 2, 2))  # loads the model
        if options.soak:
            asyncio.run(soak(url, server.pid, 60 * options.soak, 2 * options.streams))
            return
        rows: dict[str, list[tuple[float, ...]]] = {}
        prompt = [place % 250 + 1 for place in range(PROMPT)]
        for _ in range(options.rounds):
            for name, new in (("generate", options.new), ("generate, 1 token", 1)):
                begin, used = time.perf_counter(), time.process_time()
                pieces = list(stream(model, words, [prompt], Sampling(max_tokens=new)))
                assert len(pieces) == new
                rows.setdefault(name, []).append((time.perf_counter() - begin, time.process_time() - used))
            for number, new in ((1, 1), (1, options.new), (options.streams, options.new)):
                used = cpu_seconds(server.pid)
                found = asyncio.run(several(url, number, new))
                spent = cpu_seconds(server.pid) - used
                rows.setdefault(f"serve {number} x {new}", []).append((*found.values(), spent / (number * new)))
        for name, values in rows.items():
            print(name, *(f"{statistics.median(column):.5f}" for column in zip(*values, strict=True)))
        print("columns of serve: tokens/s, median and last s to the first token, s a token, CPU s a token")
        longs, shorts = rows["generate"], rows["generate, 1 token"]
        own = [(a[1] - b[1]) / (options.new - 1) for a, b in zip(longs, shorts, strict=True)]
        print(f"generate: CPU s a token after the first {statistics.median(own):.5f}")
    finally:
        server.kill()


if __name__ == "__main__":
    main()
