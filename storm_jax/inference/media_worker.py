"""A process that decodes stretches of media for `media.Decoders`, which starts it.

Not a `multiprocessing` process: those run the parent's main module again, and with it JAX. This one
needs NumPy and PyAV alone, whatever its parent is.

It says True when it is ready. Then requests come pickled through standard input, answers go pickled
through standard output, one each:

    ("open", media, frame_config, size, max_pixels, timeout)
                            ->  `SampledMedium`'s times and duration; what was open is closed
    ("read", first, last, timeout)                ->  frames uint8 [n, size, size, 3]
    ("close",)                                    ->  None

An answer is (ok, seconds that it took, value); with ok=False the value is the exception.
"""

import contextlib
import gc
import os
import pickle
import signal
import sys
import time
from dataclasses import replace
from typing import Any, BinaryIO

from storm_jax.data.shared_file import SharedFile
from storm_jax.data.video import SampledMedium


class _Requests:
    """Answers requests; holds the medium that is open."""

    def __init__(self):
        self._medium: SampledMedium | None = None
        self._held = contextlib.ExitStack()

    def answer(self, request: tuple[Any, ...]) -> Any:
        match request:
            case ("open", media, frames, size, max_pixels, timeout):
                self._close()
                if isinstance(media.data, SharedFile):
                    # Open, and not by its name: FFmpeg can then reach nothing else.
                    file = self._held.enter_context(media.data.open())
                    media = replace(media, data=file)
                self._medium = SampledMedium(media, frames, size, timeout, max_pixels)
                return self._medium.times, self._medium.duration
            case ("read", first, last, timeout):
                assert self._medium is not None, "read before open"
                return self._medium.read(first, last, timeout)[0]
            case ("close",):
                self._close()
                return None
        raise ValueError(f"request {request!r} is not known")

    def _close(self) -> None:
        if self._medium is not None:
            self._medium.close()
            self._medium = None
            # A frame of PyAV whose side data were read refers to itself, and only the collector
            # frees it: late, for it counts objects, of which such a picture is a few.
            gc.collect(1)
        self._held.close()


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are no more: the parent closed them, or ended."""
    handler = _Requests()
    pickle.dump(True, answers)
    answers.flush()
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        began = time.monotonic()
        try:
            ok, value = True, handler.answer(request)
        except Exception as error:  # the parent raises it
            ok, value = False, error
        # Protocol 5 writes large arrays from where they lie.
        pickle.dump((ok, time.monotonic() - began, value), answers, protocol=5)
        del value
        answers.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent acts
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints must not come between answers
        try:
            serve(sys.stdin.buffer, answers)
        except BrokenPipeError:
            os._exit(0)  # the parent ended; closing `answers` would fail again


if __name__ == "__main__":
    main()
