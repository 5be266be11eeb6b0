"""A server of a checkpoint under load: `python -m tests.benchmarks.serving --checkpoint runs/demo/stage2 PICTURE ...`.

Prints the second turn of a talk against its first, talks at once against one after the other, and the time to the first
word in a quiet server and while another client's long prompts enter. Quiet and busy turns alternate.
"""

import argparse
import asyncio
import base64
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from tests.benchmarks.bench import where

TALKS, ROUNDS, QUESTION = 16, 5, "Describe the picture."
WORDS = "the red circle is in the northwest and a blue square in the southeast".split()  # a token each, in the demo


class Answer(NamedTuple):
    """first_secs: from the request to its first word. tokens: of the answer."""

    text: str
    first_secs: float
    tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("pictures", nargs="+", type=Path)
    options = parser.parse_args(argv)
    urls = ["data:image/jpeg;base64," + base64.b64encode(one.read_bytes()).decode() for one in options.pictures]
    command = [sys.executable, "-m", "llava_jax.serve", "--checkpoint", options.checkpoint, "--port", "0"]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, env=os.environ)
    try:
        process.stdout.readline()
        url = process.stdout.readline().split()[1]
        while httpx2.get(url + "/readyz", timeout=30).status_code != 200:
            time.sleep(0.2)
        positions = httpx2.get(url + "/v1/models").json()["data"][0]["max_model_len"]
        port = httpx2.URL(url).port
        for line in itertools.chain(_turns(port, urls), _at_once(port, urls), _beside(port, urls, positions)):
            print(line, flush=True)
        print(where(("jax", "uvicorn")))
    finally:
        process.terminate()
    return process.wait(60)


def message(text: str, url: str | None = None) -> dict[str, Any]:
    shown = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


async def ask(port: int, messages: Sequence[dict[str, Any]], most: int = 40) -> Answer:
    """A streamed answer, on a connection of its own."""
    body = json.dumps({"messages": messages, "max_tokens": most, "temperature": 0, "stream": True,
                       "stream_options": {"include_usage": True}}).encode()  # fmt: skip
    head = ("POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start, first, text, tokens = time.perf_counter(), None, "", 0
    writer.write(head.encode() + body)
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        piece = "".join(choice["delta"].get("content", "") for choice in event["choices"])
        if first is None and (piece or any(choice["finish_reason"] for choice in event["choices"])):
            first = time.perf_counter() - start
        text += piece
        tokens = event["usage"]["completion_tokens"] if event["usage"] else tokens
    writer.close()
    assert first is not None, text
    return Answer(text, first, tokens)


def _at_once(port: int, urls: Sequence[str]) -> Iterator[str]:
    """Output tokens a second."""
    shown = list(itertools.islice(itertools.cycle(urls), TALKS * (ROUNDS + 1)))

    async def one_by_one(part: Sequence[str]) -> list[Answer]:
        return [await ask(port, [message(QUESTION, url)]) for url in part]

    async def together(part: Sequence[str]) -> list[Answer]:
        return await asyncio.gather(*(ask(port, [message(QUESTION, url)]) for url in part))

    speeds: dict[str, list[float]] = {"one": [], "all": []}
    for index in range(ROUNDS + 1):  # the first is not counted
        part, answers = shown[index * TALKS : (index + 1) * TALKS], []
        for name, function in (("all", together), ("one", one_by_one)):
            start = time.perf_counter()
            answers.append(asyncio.run(function(part)))
            speeds[name].append(sum(one.tokens for one in answers[-1]) / (time.perf_counter() - start))
        assert [one.text for one in answers[0]] == [one.text for one in answers[1]]
    one, all_ = (statistics.median(speeds[name][1:]) for name in ("one", "all"))
    ratios = sorted(a / b for a, b in zip(speeds["all"][1:], speeds["one"][1:]))
    yield (f"{TALKS} talks: {all_:,.0f} tokens/s at once, {one:,.0f} one after the other: {all_ / one:.1f} times "
           f"({ratios[0]:.1f} to {ratios[-1]:.1f})")  # fmt: skip


def _turns(port: int, urls: Sequence[str]) -> Iterator[str]:
    """Milliseconds to the first word of a talk's first and second turn; each picture is new."""
    first, second = [], []
    for url in urls:
        start = message(QUESTION, url)
        answer = asyncio.run(ask(port, [start]))
        talk = [start, {"role": "assistant", "content": answer.text}, message("Which colour is it?")]
        first.append(answer.first_secs)
        second.append(asyncio.run(ask(port, talk)).first_secs)
    yield f"first word: {_ms(first)} in the first turn of a talk, {_ms(second)} in the second"


def _beside(port: int, urls: Sequence[str], positions: int) -> Iterator[str]:
    rng = random.Random(0)

    words = positions * 3 // 4

    async def long_prompts(stop: asyncio.Event) -> int:
        count = 0
        while not stop.is_set():
            await ask(port, [message(" ".join(rng.choices(WORDS, k=words)))], 4)
            count += 1
        return count

    async def short(secs: list[float]) -> None:
        for url in urls:
            await asyncio.sleep(0.05 * rng.random())
            secs.append((await ask(port, [message(" ".join(rng.choices(WORDS, k=4)), url)], 4)).first_secs)

    async def busy(secs: list[float]) -> int:
        stop = asyncio.Event()
        other = asyncio.create_task(long_prompts(stop))
        await short(secs)
        stop.set()
        return await other

    quiet, beside, count = list[float](), list[float](), 0
    for _ in range(ROUNDS):
        asyncio.run(short(quiet))
        count += asyncio.run(busy(beside))
    ratio = _p95(beside) / _p95(quiet)
    yield (f"first word: {_ms(quiet)} in a quiet server, {_ms(beside)} while {count} prompts of {words} words of "
           f"another client entered: {ratio:.2f} times at p95")  # fmt: skip


def _p95(secs: Sequence[float]) -> float:
    return sorted(secs)[int(0.95 * len(secs))]


def _ms(secs: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(secs):.1f} ms (p95 {1e3 * _p95(secs):.1f})"


if __name__ == "__main__":
    sys.exit(main())
