"""A server for a loaded model, put together and run."""

import socket
from collections.abc import Callable, Sequence

import uvicorn
from fastapi import FastAPI

from storm_jax.inference.engine import Engine
from storm_jax.inference.load import LoadedModel
from storm_jax.serving import app
from storm_jax.serving.chat import Chat
from storm_jax.serving.connections import PatientProtocol
from storm_jax.serving.media import MediaReader
from storm_jax.serving.metrics import Metrics
from storm_jax.serving.remote import Remote
from storm_jax.serving.scheduler import Scheduler
from storm_jax.serving.settings import Settings
from storm_jax.serving.warm_up import warm_up

_BACKLOG = 512  # connections that wait to be taken


class Server:
    """Holds the engine from the moment that it is made; `run` serves until it is told to stop."""

    def __init__(
        self,
        settings: Settings,
        loaded: LoadedModel,
        tokenizer,
        *,
        slots: int,
        context: int,
        remote: Remote | None = None,
    ):
        """
        Args:
          slots: answers at one time.
          context: tokens of a slot.
          remote: fetches media, where they are allowed; None: as `settings` says.
        """
        self._settings, self._config, self._tokenizer = settings, loaded.config, tokenizer
        self.metrics = Metrics()
        self._engine = Engine(loaded, slots=slots, context=context)
        self.scheduler = Scheduler(self._engine, tokenizer, self.metrics)
        if remote is None and settings.allow_remote_media:
            remote = Remote(settings.max_media_bytes, settings.fetch_seconds)
        size = loaded.config.model.vit.image_size
        self.reader = MediaReader(settings, loaded.config.data, size, self.metrics, remote)
        chat = Chat(
            settings, loaded.config, tokenizer, self.scheduler, context, self.reader, self.metrics
        )
        self.app: FastAPI = app.build(settings, self.scheduler, chat, self.metrics)
        self._uvicorn: uvicorn.Server | None = None

    def warm_up(
        self, frames: Sequence[int] | None, tell: Callable[[str], None] = lambda line: None
    ) -> None:
        """Compiles ahead, see `warm_up.warm_up`."""
        warm_up(
            self.scheduler,
            self._engine,
            self._tokenizer,
            self._config,
            frames,
            self._settings.max_frames,
            tell,
        )

    def run(
        self,
        listening: socket.socket,
        grace: int,
        ready: Callable[[], None] = lambda: None,
        protocol: type[PatientProtocol] = PatientProtocol,
    ) -> None:
        """Serves until `stop`, SIGTERM or SIGINT, and ends the engine.

        Args:
          listening: a bound socket.
          grace: seconds that running requests may take to finish.
          ready: called when requests are taken.
          protocol: of connections.
        """
        config = uvicorn.Config(
            self.app,
            http=protocol,
            ws="none",
            backlog=_BACKLOG,
            # Idle ones, those that wait for a refusal, and someone who looks at /health.
            limit_concurrency=4 * self._settings.max_requests + 64,
            timeout_graceful_shutdown=grace,
            log_level="warning",
            access_log=False,
            server_header=False,
        )
        self._uvicorn = _Uvicorn(config, ready)
        self._uvicorn.run([listening])

    def stop(self) -> None:
        """Ends `run`, from another thread."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Says when it takes requests."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
