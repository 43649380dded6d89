"""Serves a checkpoint over HTTP, to OpenAI's clients and to a browser.

python -m storm_jax.serve --checkpoint=DIR [--host=127.0.0.1] [--port=8000] [--slots=8]
    [--api-key=KEY] [--allowed-media-path=DIR] [--allow-remote-media]

docs/serving.md explains every flag. SIGTERM ends it: no new requests are taken, and those that run
have --grace seconds to finish. Exit status 0 then; 1 for a checkpoint or flags that cannot be used.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import uvicorn
from absl import app, flags

from storm_jax import checkpoint
from storm_jax.config import ConfigError
from storm_jax.data import text
from storm_jax.inference import load as loading
from storm_jax.inference.engine import Engine
from storm_jax.serving import app as web
from storm_jax.serving.chat import Chat
from storm_jax.serving.connections import PatientProtocol
from storm_jax.serving.media import MediaReader
from storm_jax.serving.metrics import Metrics
from storm_jax.serving.remote import Remote
from storm_jax.serving.scheduler import Scheduler
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
    "context", 0, "Tokens of a slot, prompt and answer; 0: as long as rows were in training.", 0
)
_FRAMES = flags.DEFINE_integer("frames", 0, "Frames of a video, at most; 0: as in training.", 0)
_SAMPLING = flags.DEFINE_integer(
    "temporal-sampling", 0, "Keep every so many pooled frames; 0: as in training.", 0
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
    "decoders", _SETTINGS.decoders, "Threads that decode media; each holds one medium's frames.", 1
)
_REQUEST_SECONDS = flags.DEFINE_float(
    "request-seconds", _SETTINGS.request_seconds, "Longest time for one request.", 1
)
_RECEIVE_SECONDS = flags.DEFINE_float(
    "receive-seconds", _SETTINGS.receive_seconds, "Longest time for the body of a request.", 1
)
_GRACE = flags.DEFINE_integer("grace", 30, "Seconds for running requests after SIGTERM.", 0)
_WARM = flags.DEFINE_boolean("warm-up", True, "Compile before the first request.")


class _Server(uvicorn.Server):
    """Says when it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"serving {_NAME.value} at http://{host}:{port}", file=sys.stderr, flush=True)


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
