"""Many clients on one server: errors, throughput, latencies, and whether memory stays flat.

    python -m storm_jax.serve --checkpoint=DIR --slots=64 --max-requests=128 &
    python benchmarks/serve_load.py --url=http://127.0.0.1:8000 --server_pid=$! --clients=64
        --seconds=600 --media=FOLDER --out=benchmarks/results/serve_load.json

With --size=NAME instead of --url, a server with random weights of that size (configs/long.py) is
started first, in a process of its own, and ended afterwards:

    python benchmarks/serve_load.py --size=qwen2_7b --slots=64 --out=FILE

Each client asks again as soon as it is answered: a video or an image of FOLDER (without one, clips
of 16 to 64 frames and pictures are made), streamed or not, with answers of different lengths. Every
`fresh`-th medium is changed by a byte behind its end, so that it is another content and must be
encoded anew. One in twenty clients leaves in the middle of its answer, where that is streamed.
Before, one client alone gives the baseline. Every half minute a line says how it goes, and --out
has what was measured so far, with "complete": false.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import httpx2

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.serve_clients import Load, Questions, for_seconds, summary, under_load  # noqa: E402
from benchmarks.serve_watch import Watch, metrics, say, written  # noqa: E402

_MEDIA = {".mp4": "video", ".mkv": "video", ".webm": "video", ".png": "image", ".jpg": "image"}
_CLIPS = (16, 32, 48, 64)  # frames of those that are made


async def warmed(
    http: httpx2.AsyncClient, questions: Questions, clients: int, least: float, most: float
) -> dict:
    """Load until nothing has been compiled for `least` seconds, but no longer than `most`."""
    began, load, done = time.perf_counter(), Load(), False

    async def quiet() -> None:
        nonlocal done
        compiles, since = -1.0, began
        try:
            while not done:
                now = (await metrics(http)).get("storm_compiles_total", 0.0)
                if now != compiles:
                    compiles, since = now, time.perf_counter()
                    say(f"warming up: {compiles:.0f} programs compiled, {len(load.whole)} answered")
                passed = time.perf_counter()
                done = passed - since >= least or passed - began >= most
                await asyncio.sleep(0.5)
        finally:  # also where the server has gone
            done = True

    watching = asyncio.create_task(quiet())
    seconds = await under_load(http, questions, clients, lambda: not done, 1, load)
    await watching
    return summary(load, seconds)


async def measure(
    arguments: argparse.Namespace,
    url: str,
    server: int,
    media: list[tuple[str, bytes]],
    about: dict,
) -> dict:
    """One client, then all of them.

    Args:
      server: process id; 0: of another machine.
      about: begins the result.
    """
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    limits = httpx2.Limits(max_connections=None)
    result = {
        "complete": False, **about, "clients": arguments.clients, "media": len(media),
        "media_bytes": sum(len(data) for _, data in media),
        "answer_tokens": [arguments.shortest, arguments.tokens], "fresh": arguments.fresh,
    }  # fmt: skip

    def save() -> None:
        if arguments.out is not None:
            written(result, arguments.out)

    async with httpx2.AsyncClient(
        base_url=url, headers=headers, timeout=600, limits=limits, trust_env=False
    ) as http:
        model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        lengths = (arguments.shortest, arguments.tokens)
        questions = Questions(media, model, lengths, arguments.fresh)
        longest = max(arguments.longest_warm_up, arguments.warm_up)
        result["warm_up"] = await warmed(
            http, questions, arguments.clients, arguments.warm_up, longest
        )
        save()
        say(f"one client for {arguments.baseline_seconds:g} s")
        before = await metrics(http)
        alone = Load()
        took = await under_load(
            http, questions, 1, for_seconds(arguments.baseline_seconds), 2, alone
        )
        result["one_client"] = summary(alone, took) | counted(before, await metrics(http))
        save()
        say(f"{arguments.clients} clients for {arguments.seconds:g} s")
        load, began, before = Load(), time.perf_counter(), await metrics(http)
        watch = Watch(
            http,
            server,
            max(arguments.seconds / 200, 0.25),
            lambda: (
                f"{time.perf_counter() - began:.0f} s: {len(load.whole)} answered,"
                f" {len(load.errors)} errors"
            ),
        )

        def so_far() -> None:
            passed = time.perf_counter() - began
            result["all_clients"] = summary(load, passed) | counted(before, watch.rows[-1])
            result["throughput_ratio"] = ratio(result["all_clients"], result["one_client"])
            result["memory"] = watch.memory()
            result["over_time"] = watch.rows[:: max(len(watch.rows) // 60, 1)]
            save()

        watching = asyncio.create_task(watch.run(so_far))
        goes_on = for_seconds(arguments.seconds)
        took = await under_load(http, questions, arguments.clients, goes_on, 3, load)
        watching.cancel()
        so_far()
        await asyncio.sleep(1)
        after = await metrics(http)
    result["all_clients"] = summary(load, took) | counted(before, after)
    result["throughput_ratio"] = ratio(result["all_clients"], result["one_client"])
    result |= {"after": after, "complete": True}
    save()
    return result


def counted(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What the server counted in between."""
    names = {
        "process_cpu_seconds_total": "server_cpu_seconds",
        "storm_compiles_total": "programs_compiled",
        "storm_compile_waits_total": "waited_for_a_program",
        "storm_frames_encoded_total": "frames_encoded",
        "storm_encode_seconds_total": "encode_seconds",
        "storm_decode_seconds_total": "decode_seconds",
        "storm_visual_cache_hits_total": "media_cached",
        "storm_visual_cache_misses_total": "media_encoded",
    }
    return {
        shown: round(after[name] - before.get(name, 0.0), 3)
        for name, shown in names.items()
        if name in after
    }


def ratio(together: dict, alone: dict) -> float:
    """Of throughputs."""
    each = "answer_tokens_per_second"
    return round(together[each] / max(alone[each], 1e-9), 2)


def made_media(folder: Path, videos: int, images: int) -> None:
    """Clips of 16 to 64 frames and pictures, of different sizes."""
    from tests.data.media_files import write

    for i in range(videos):
        size = ((160, 120), (320, 240), (448, 252))[i % 3]
        write(folder / f"{i}.mp4", _CLIPS[i % len(_CLIPS)], size=size, fps=25, number=100 * i)
    for i in range(images):
        size = ((160, 120), (320, 240))[i % 2]
        number = 100 * i
        path = folder / f"{i}.png"
        write(path, 1, codec="png", format="image2", pix_fmt="rgb24", size=size, number=number)


def serve(arguments: argparse.Namespace) -> None:
    """A server with random weights, on any free port; prints where, and on what, as JSON."""
    import jax

    from benchmarks.train_step import configured
    from storm_jax.data.text import load_tokenizer
    from storm_jax.inference import load
    from storm_jax.serving.server import Server
    from storm_jax.serving.settings import Settings

    began = time.perf_counter()
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
    context = arguments.context or config.data.sequence_length + 64 + arguments.tokens
    server = Server(
        settings,
        load.random(config, quantization=arguments.quantization),
        load_tokenizer("bytes"),
        slots=arguments.slots,
        context=context,
    )
    say(f"weights after {time.perf_counter() - began:.0f} s")
    most = settings.max_frames
    server.warm_up(tuple(dict.fromkeys((1, *(min(n, most) for n in _CLIPS)))), say)
    about = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "context": context,
        "ready_after_seconds": round(time.perf_counter() - began, 1),
    }
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        line = json.dumps({"url": url, "about": about})
        server.run(listening, 10, lambda: print(line, flush=True))


@contextlib.contextmanager
def started(arguments: argparse.Namespace) -> Generator[tuple[str, int, dict]]:
    """`serve` in another process: its address, its process id, and what it says of itself."""
    command = [sys.executable, __file__, "--serve", *sys.argv[1:]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line:
            sys.exit(f"the server of --size={arguments.size} did not start")
        told = json.loads(line)
        say(f"serving after {told['about']['ready_after_seconds']} s on {told['about']['device']}")
        chosen = {k: getattr(arguments, k) for k in ("size", "slots", "quantization", "cache_mb")}
        yield told["url"], process.pid, chosen | told["about"]
    finally:
        process.terminate()
        process.wait()


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--server_pid", type=int, default=0, help="of --url, for its decoders")
    parser.add_argument("--api_key", default="")
    parser.add_argument("--size", default="", help="start a server with random weights of it")
    parser.add_argument("--slots", type=int, default=64, help="of that server")
    parser.add_argument("--context", type=int, default=0, help="of that server; 0: as in serve")
    parser.add_argument("--decoders", type=int, default=8, help="of that server")
    parser.add_argument("--cache_mb", type=int, default=256, help="of that server")
    parser.add_argument("--quantization", default="", choices=("", "int8", "fp8", "fp8_dynamic"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--baseline_seconds", type=float, default=60)
    parser.add_argument(
        "--warm_up", type=float, default=30, help="seconds without compiling before measurements"
    )
    parser.add_argument("--longest_warm_up", type=float, default=300, help="seconds")
    parser.add_argument("--tokens", type=int, default=64, help="of the longest answer")
    parser.add_argument("--shortest", type=int, default=32, help="tokens of the shortest answer")
    parser.add_argument("--fresh", type=int, default=4, help="every so many media is new; 0: none")
    parser.add_argument("--media", type=Path, help="folder of videos and images")
    parser.add_argument("--videos", type=int, default=28, help="that are made without --media")
    parser.add_argument("--images", type=int, default=8, help="that are made without --media")
    parser.add_argument("--out", type=Path, help="JSON; default: standard output")
    return parser.parse_args()


def main() -> None:
    from benchmarks import machine

    arguments = flags()
    if not 1 <= arguments.shortest <= arguments.tokens:
        sys.exit(f"--shortest={arguments.shortest}: between 1 and --tokens={arguments.tokens}")
    if arguments.serve:
        serve(arguments)
        return
    with tempfile.TemporaryDirectory() as made:
        if arguments.media is None:
            made_media(Path(made), arguments.videos, arguments.images)
        files = sorted((arguments.media or Path(made)).iterdir())
        media = [(_MEDIA[f.suffix], f.read_bytes()) for f in files if f.suffix in _MEDIA]
        if not media:
            sys.exit(f"no media in {arguments.media}: {', '.join(_MEDIA)} are looked for")
    elsewhere = contextlib.nullcontext((arguments.url, arguments.server_pid, {}))
    with started(arguments) if arguments.size else elsewhere as (url, server, about):
        about = machine.describe() | about
        result = asyncio.run(measure(arguments, url, server, media, about))
    if arguments.out is None:
        print(json.dumps(result, indent=1))
    load = result["all_clients"]
    say(
        f"{load['answered']} answered, {load['errors']} errors, {load['answer_tokens_per_second']}"
        f" tokens/s, {result['throughput_ratio']} times one client; memory {result['memory']}"
    )
    sys.exit(1 if load["errors"] else 0)


if __name__ == "__main__":
    main()
