"""Many clients on one server: errors, throughput, latencies, and whether memory stays flat.

    python -m storm_jax.serve --checkpoint=DIR --slots=64 --max-requests=128 &
    python benchmarks/serve_load.py --url=http://127.0.0.1:8000 --clients=64 --seconds=600
        --baseline_seconds=30 --media=FOLDER --out=benchmarks/results/serve_load.json

With --size=NAME instead of --url, a server with random weights of that size (configs/long.py) is
started first, in a process of its own, and ended afterwards:

    python benchmarks/serve_load.py --size=qwen2_7b --slots=64 --out=FILE

Each client asks again as soon as it is answered: a video or an image of FOLDER (without one, clips
and pictures are made), streamed or not, with answers of different lengths. Every `fresh`-th medium
is changed by a byte behind its end, so that it is another content and must be encoded anew. One in
twenty clients leaves in the middle of its answer. Before, one client alone gives the baseline.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

_MEDIA = {".mp4": "video", ".mkv": "video", ".webm": "video", ".png": "image", ".jpg": "image"}
_WATCHED = (
    "process_resident_memory_bytes", "storm_device_memory_bytes", "storm_requests_running",
    "storm_requests_waiting", "storm_requests_open", "storm_visual_cache_bytes", "process_open_fds",
)  # fmt: skip
_LEAVES = 0.05  # share of the requests whose client does not wait for the end


@dataclass
class Load:
    """What the clients met."""

    whole: list[float] = field(default_factory=list)  # seconds of each request
    first: list[float] = field(default_factory=list)  # to its first token
    answer_tokens: int = 0
    prompt_tokens: int = 0
    frames: int = 0
    left: int = 0
    errors: list[str] = field(default_factory=list)


class Questions:
    """Requests at random: media, lengths, streamed or not."""

    def __init__(self, media: list[tuple[str, bytes]], model: str, tokens: int, fresh: int):
        self._media, self._model, self._tokens, self._fresh = media, model, tokens, fresh
        self._asked = 0

    def next(self, rng: random.Random) -> dict:
        kind, data = rng.choice(self._media)
        self._asked += 1
        if self._fresh and self._asked % self._fresh == 0:
            # A box that players pass over (mp4), or what stands behind a picture's end.
            data += b"\0\0\0\x0cfree" + self._asked.to_bytes(4, "big")
        url = f"data:{kind}/x;base64,{base64.b64encode(data).decode()}"
        part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
        question = {"type": "text", "text": rng.choice(["What?", "Tell me what happens here."])}
        stream = rng.random() < 0.7
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": [part, question]}],
            "max_tokens": rng.randint(max(self._tokens // 4, 1), self._tokens),
            "temperature": rng.choice([0.0, 1.0]),
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }


async def ask(http: httpx2.AsyncClient, body: dict, leave: bool, load: Load) -> None:
    """One request, and what came of it."""
    began = time.perf_counter()
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode()[:200]
                load.errors.append(f"{answer.status_code}: {text}")
                return
            if not body["stream"]:
                usage = json.loads(await answer.aread())["usage"]
            else:
                usage = None
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        load.errors.append(chunk["error"]["message"])
                        return
                    if leave and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                        load.left += 1
                        return
                    usage = chunk.get("usage") or usage
                if usage is None:
                    load.errors.append("a stream without an end")
                    return
    except httpx2.HTTPError as error:
        load.errors.append(f"{type(error).__name__}: {error}")
        return
    load.whole.append(time.perf_counter() - began)
    load.answer_tokens += usage["completion_tokens"]
    load.prompt_tokens += usage["prompt_tokens"]
    load.frames += usage["storm"]["frames"]
    if usage["storm"]["first_token_seconds"] is not None:
        load.first.append(usage["storm"]["first_token_seconds"])


async def metrics(http: httpx2.AsyncClient) -> dict[str, float]:
    """The gauges that are watched; devices added up."""
    found: dict[str, float] = {}
    for line in (await http.get("/metrics")).text.splitlines():
        name = line.split("{")[0].split(" ")[0]
        if name in _WATCHED:
            found[name] = found.get(name, 0.0) + float(line.split()[-1])
    return found


async def watch(http: httpx2.AsyncClient, every: float, rows: list[dict]) -> None:
    began = time.perf_counter()
    while True:
        rows.append({"seconds": round(time.perf_counter() - began, 1), **await metrics(http)})
        await asyncio.sleep(every)


async def under_load(
    http: httpx2.AsyncClient, questions: Questions, clients: int, seconds: float, seed: int
) -> tuple[Load, float]:
    """Runs clients for some time; returns what they met and how long it took to the last answer."""
    load, ends = Load(), time.perf_counter() + seconds

    async def client(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while time.perf_counter() < ends:
            leave = clients > 1 and rng.random() < _LEAVES
            await ask(http, questions.next(rng), leave, load)

    began = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(clients)))
    return load, time.perf_counter() - began


def summary(load: Load, seconds: float) -> dict:
    def percentiles(values: list[float]) -> dict[str, float]:
        if not values:
            return {}
        shares = (50, 90, 95, 99, 100)
        return {
            f"p{p}": round(float(v), 4)
            for p, v in zip(shares, np.percentile(values, shares), strict=True)
        }

    return {
        "seconds": round(seconds, 1),
        "answered": len(load.whole),
        "left_by_the_client": load.left,
        "errors": len(load.errors),
        "first_errors": load.errors[:5],
        "requests_per_second": round(len(load.whole) / seconds, 3),
        "answer_tokens_per_second": round(load.answer_tokens / seconds, 2),
        "prompt_tokens_per_second": round(load.prompt_tokens / seconds, 2),
        "frames_per_second": round(load.frames / seconds, 2),
        "first_token_seconds": percentiles(load.first),
        "request_seconds": percentiles(load.whole),
    }


def growth(rows: list[dict], name: str) -> dict | None:
    """Medians of the second and the last quarter of the time; the first one fills caches."""
    values = [row[name] for row in rows if name in row]
    if len(values) < 8:
        return None
    quarter = len(values) // 4
    early, late = np.median(values[quarter : 2 * quarter]), np.median(values[-quarter:])
    return {"early": float(early), "late": float(late), "ratio": round(float(late / early), 4)}


async def measure(arguments: argparse.Namespace, url: str, media: list[tuple[str, bytes]]) -> dict:
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(
        base_url=url, headers=headers, timeout=600, limits=limits, trust_env=False
    ) as http:
        model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        questions = Questions(media, model, arguments.tokens, arguments.fresh)
        # Every medium once, so that nothing is compiled while the clock runs.
        _, seconds = await under_load(http, questions, arguments.clients, arguments.warm_up, 1)
        alone, alone_seconds = await under_load(http, questions, 1, arguments.baseline_seconds, 2)
        rows: list[dict] = []
        watching = asyncio.create_task(watch(http, max(arguments.seconds / 200, 0.25), rows))
        load, seconds = await under_load(http, questions, arguments.clients, arguments.seconds, 3)
        watching.cancel()
        await asyncio.sleep(1)
        after = await metrics(http)
    together, before = summary(load, seconds), summary(alone, alone_seconds)
    return {
        "clients": arguments.clients,
        "media": len(media),
        "one_client": before,
        "all_clients": together,
        "throughput_ratio": round(
            together["answer_tokens_per_second"] / max(before["answer_tokens_per_second"], 1e-9), 2
        ),
        "memory": {
            "rss": growth(rows, "process_resident_memory_bytes"),
            "device": growth(rows, "storm_device_memory_bytes"),
            "open_files": growth(rows, "process_open_fds"),
        },
        "after": after,
        "over_time": rows[:: max(len(rows) // 60, 1)],
    }


def made_media(folder: Path) -> None:
    """Clips of 2 to 8 seconds and pictures, of different sizes."""
    from tests.data.media_files import write

    for i, (seconds, size) in enumerate([(2, (160, 120)), (4, (320, 240)), (8, (320, 240))]):
        write(folder / f"{i}.mp4", 25 * seconds, size=size, fps=25, number=i)
        write(folder / f"{i}.png", 1, codec="png", format="image2", pix_fmt="rgb24", size=size)


def serve(arguments: argparse.Namespace) -> None:
    """A server with random weights, on any free port, which it prints."""
    from benchmarks.train_step import configured
    from storm_jax.data.text import load_tokenizer
    from storm_jax.inference import load
    from storm_jax.serving.server import Server
    from storm_jax.serving.settings import Settings

    config = configured("long", arguments.size, [])
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, tokenizer="bytes", chat_template="qwen2")
    )
    settings = Settings(
        model=config.name,
        max_frames=config.data.frames.max_frames,
        max_requests=2 * arguments.clients,
        decoders=arguments.decoders,
        cache_bytes=arguments.cache_mb << 20,
    )
    server = Server(
        settings,
        load.random(config, quantization=arguments.quantization),
        load_tokenizer("bytes"),
        slots=arguments.slots,
        context=config.data.sequence_length + 64 + arguments.tokens,
    )
    server.warm_up()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server.run(listening, 10, lambda: print(f"http://127.0.0.1:{port}", flush=True))


@contextlib.contextmanager
def started(arguments: argparse.Namespace) -> Iterator[str]:
    """`serve` in another process; its address."""
    command = [sys.executable, __file__, "--serve", *sys.argv[1:]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            sys.exit(f"the server of --size={arguments.size} did not start")
        yield url
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api_key", default="")
    parser.add_argument("--size", default="", help="start a server with random weights of it")
    parser.add_argument("--slots", type=int, default=64, help="of that server")
    parser.add_argument("--decoders", type=int, default=8, help="of that server")
    parser.add_argument("--cache_mb", type=int, default=1024, help="of that server")
    parser.add_argument("--quantization", default="", choices=("", "int8", "fp8"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--baseline_seconds", type=float, default=30)
    parser.add_argument("--warm_up", type=float, default=30, help="seconds before all measurements")
    parser.add_argument("--tokens", type=int, default=64, help="of the longest answer")
    parser.add_argument("--fresh", type=int, default=4, help="every so many media is new; 0: none")
    parser.add_argument("--media", type=Path, help="folder of videos and images")
    parser.add_argument("--out", type=Path, help="JSON; default: standard output")
    arguments = parser.parse_args()
    from benchmarks import machine

    if arguments.serve:
        serve(arguments)
        return
    with tempfile.TemporaryDirectory() as made:
        if arguments.media is None:
            made_media(Path(made))
        files = sorted((arguments.media or Path(made)).iterdir())
        media = [(_MEDIA[f.suffix], f.read_bytes()) for f in files if f.suffix in _MEDIA]
        if not media:
            sys.exit(f"no media in {arguments.media}: {', '.join(_MEDIA)} are looked for")
    with started(arguments) if arguments.size else contextlib.nullcontext(arguments.url) as url:
        measured = asyncio.run(measure(arguments, url, media))
    chosen = {k: getattr(arguments, k) for k in ("size", "slots", "quantization")}
    result = {**machine.describe(), **(chosen if arguments.size else {}), **measured}
    text = json.dumps(result, indent=1) + "\n"
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.write_text(text)
    load = result["all_clients"]
    print(
        f"{load['answered']} answered, {load['errors']} errors, {load['answer_tokens_per_second']}"
        f" tokens/s, {result['throughput_ratio']} times one client; memory {result['memory']}",
        file=sys.stderr,
    )
    sys.exit(1 if load["errors"] else 0)


if __name__ == "__main__":
    main()
