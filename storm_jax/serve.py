"""Serves a checkpoint over HTTP, to OpenAI's clients and to a browser.

python -m storm_jax.serve --checkpoint=DIR [--host=127.0.0.1] [--port=8000] [--slots=8]
    [--api-key=KEY] [--allowed-media-path=DIR] [--allow-remote-media]

docs/serving.md explains every flag. SIGTERM ends it: no new requests are taken, and those that run
have --grace seconds to finish. Exit status 0 then; 1 for a checkpoint or flags that cannot be used.
"""

import dataclasses
import os
import signal
import socket
import sys
import time
from typing import cast

import jax
from absl import app, flags

from storm_jax import cache_flag, checkpoint
from storm_jax.config import ConfigError
from storm_jax.data import text
from storm_jax.inference.engine import ContextError
from storm_jax.inference.load import load
from storm_jax.inference.options import Options
from storm_jax.inference.tokenizer import load_tokenizer
from storm_jax.inference.weights import QUANTIZATIONS, Quantization
from storm_jax.serving.settings import Settings

_MB = 1 << 20
_SETTINGS = Settings(model="")  # for the defaults

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A training workdir, or one checkpoint.", required=True
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0: any that is free.", 0, 65535)
_NAME = flags.DEFINE_string("name", "", "What clients call the model; default: the run's name.")
_KEY = flags.DEFINE_string(
    "api-key", "", "What clients must send; default: $STORM_JAX_API_KEY, and without it nothing."
)
_SLOTS = flags.DEFINE_integer("slots", 8, "Answers that are generated at one time.", 1)
_CONTEXT = flags.DEFINE_integer(
    "context", 0, "Tokens of a slot; 0: a row of training, and --max-tokens for the answer.", 0
)
_FRAMES = flags.DEFINE_integer("frames", 0, "Frames of a video, at most; 0: as in training.", 0)
_SAMPLING = flags.DEFINE_integer(
    "temporal-sampling", 0, "Keep every so many pooled frames; 0: as in training.", 0
)
_QUANTIZATION = flags.DEFINE_enum(
    "quantization", "", QUANTIZATIONS, "Of the weights; docs/inference.md says of which."
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max-tokens", _SETTINGS.max_tokens, "Longest answer, where a request does not say.", 1
)
_MEDIA_PATHS = flags.DEFINE_multi_string(
    "allowed-media-path", [], "Clients may name files in this folder (repeatable)."
)
_REMOTE = flags.DEFINE_boolean(
    "allow-remote-media", False, "Fetch media from public addresses for clients."
)
_MAX_REQUESTS = flags.DEFINE_integer(
    "max-requests", _SETTINGS.max_requests, "Requests at one time, waiting ones included.", 1
)
_MAX_MEDIA = flags.DEFINE_integer("max-media", _SETTINGS.max_media, "Media of one request.", 1)
_BODY = flags.DEFINE_integer(
    "max-body-mb", _SETTINGS.max_body_bytes // _MB, "Size of a request, MiB.", 1
)
_MEDIA = flags.DEFINE_integer(
    "max-media-mb", _SETTINGS.max_media_bytes // _MB, "Size of a medium, MiB.", 1
)
_PIXELS = flags.DEFINE_integer(
    "max-pixels", _SETTINGS.max_pixels, "Pixels of one picture, as stored.", 1
)
_CACHE = flags.DEFINE_integer(
    "cache-mb", _SETTINGS.cache_bytes // _MB, "Device memory for encoded media, MiB.", 0
)
_DECODERS = flags.DEFINE_integer(
    "decoders", _SETTINGS.decoders, "Processes that decode media, and media held as frames.", 1
)
_REQUEST_SECONDS = flags.DEFINE_float(
    "request-seconds", _SETTINGS.request_seconds, "Longest time for one request.", 1
)
_RECEIVE_SECONDS = flags.DEFINE_float(
    "receive-seconds", _SETTINGS.receive_seconds, "Longest time for the body of a request.", 1
)
_GRACE = flags.DEFINE_integer("grace", 30, "Seconds for running requests after SIGTERM.", 0)
_WARM = flags.DEFINE_string(
    "warm-up",
    "longest",
    "What to compile before the first request: longest (an image and the longest video), numbers of"
    " frames (1,32,64), all, or none.",
)


def bound(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet.

    Raises:
      ConfigError: the address is taken, or not this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on --host={host} --port={port}: {error.strerror}"
        ) from error
    return listening


def run() -> None:
    try:
        from storm_jax.serving.server import Server
        from storm_jax.serving.warm_up import frame_numbers
    except ImportError as error:
        raise ConfigError(
            f"the server's packages are not installed ({error}): pip install 'storm_jax[serve]'"
        ) from error
    began = time.perf_counter()
    listening = bound(_HOST.value, _PORT.value)  # first, for it costs nothing to fail here
    cache_flag.keep_programs()
    loaded = load(_CHECKPOINT.value, quantization=cast(Quantization, _QUANTIZATION.value))
    config = loaded.config
    options = Options(frames=_FRAMES.value, temporal_sampling=_SAMPLING.value)
    config = options.apply(config)
    loaded = dataclasses.replace(loaded, config=config)
    tokenizer = load_tokenizer(_CHECKPOINT.value, config)
    settings = Settings(
        model=_NAME.value or config.name,
        api_key=_KEY.value or os.environ.get("STORM_JAX_API_KEY", ""),
        allowed_media_path=tuple(_MEDIA_PATHS.value),
        allow_remote_media=_REMOTE.value,
        max_frames=config.data.frames.max_frames,
        max_media=_MAX_MEDIA.value,
        max_pixels=_PIXELS.value,
        max_body_bytes=_BODY.value * _MB,
        max_media_bytes=_MEDIA.value * _MB,
        max_requests=_MAX_REQUESTS.value,
        max_tokens=_MAX_TOKENS.value,
        receive_seconds=_RECEIVE_SECONDS.value,
        decode_seconds=config.data.decode_timeout,
        request_seconds=_REQUEST_SECONDS.value,
        decoders=_DECODERS.value,
        cache_bytes=_CACHE.value * _MB,
    )
    warm = frame_numbers(_WARM.value, settings.max_frames)
    context = _CONTEXT.value or config.data.sequence_length + _MAX_TOKENS.value
    server = Server(settings, loaded, tokenizer, slots=_SLOTS.value, context=context)
    _say(f"{settings.model}: {_SLOTS.value} slots of {context} tokens on {jax.devices()[0]}")
    server.warm_up(warm, _say)
    _say(f"ready after {time.perf_counter() - began:.1f} s")
    host, port = listening.getsockname()[:2]
    at = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    # uvicorn ends gracefully on these, and then sends them again to whoever had them before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(listening, _GRACE.value, lambda: _say(f"serving at {at}"))


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments not understood: {' '.join(argv[1:])}")
    try:
        run()
    except (checkpoint.CheckpointError, ConfigError, ContextError, text.TokenizerError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    app.run(main)
