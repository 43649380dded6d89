"""What is behind the objects: a picture for every group of frames, moving from group to group.

A background holds still within a group, so that showing the frames of a group in another order
changes nothing but the objects. It is drawn without regard to question and answer, and its picture
has the same distribution in every group: a frame does not tell from its background when it is.
"""

import hashlib
import os
from abc import ABC, abstractmethod

import numpy as np

from storm_jax.data.drawing import texture
from storm_jax.data.video import MediaError, decode, probe

_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv")
_SECONDS, _FPS = 16.0, 8.0  # of a file that are used: its beginning
_SHORTEST = 16  # pictures that a file must give
_CONTRAST, _SATURATION = 0.6, 0.35  # of natural clips: objects stand out by their colour
_TRAIN = 0.7  # share of each file, from its start, that training shows


class Background(ABC):
    """A source of backgrounds; `description` is what dataset.json says of it."""

    description: dict[str, object]

    @abstractmethod
    def draw(self, rng: np.random.Generator, groups: int, size: int, held_out: bool) -> np.ndarray:
        """One picture a group, float32 [groups, size, size, 3], 0 to 255."""


class Texture(Background):
    """Two layers of noise with the spectrum of natural images that drift over one another.

    Their distribution is the same after any shift (`drawing.texture`), hence in every group.
    """

    description = {
        "kind": "procedural: two drifting layers of noise with a natural spectrum, no real video"
    }

    def draw(self, rng: np.random.Generator, groups: int, size: int, held_out: bool) -> np.ndarray:
        pictures = np.full((groups, size, size, 3), rng.uniform(80, 160), np.float32)
        for _ in range(2):
            layer = (rng.uniform(3, 16) * texture(rng, size)).astype(np.float32)
            hue = rng.uniform(0.8, 1.2, 3).astype(np.float32)
            dy, dx = rng.integers(-size // 8, size // 8 + 1, 2)
            for g in range(groups):
                pictures[g] += np.roll(layer, (g * dy, g * dx), (0, 1))[:, :, None] * hue
        return np.clip(pictures, 20, 235)


class Still(Background):
    """One muted picture a clip that never changes: the calmest case, for tiny models."""

    description = {"kind": "procedural: one still picture with a natural spectrum a clip"}

    def draw(self, rng: np.random.Generator, groups: int, size: int, held_out: bool) -> np.ndarray:
        grey = rng.uniform(90, 150) + rng.uniform(0, 10) * texture(rng, size)
        picture = grey[:, :, None] + rng.uniform(-8, 8, 3)
        return np.repeat(picture[None].astype(np.float32), groups, axis=0)


class Clips(Background):
    """Real videos, played forwards and backwards in turn from a random moment on.

    In such a loop every moment is equally likely in every group. Training shows the beginning of
    each file, held-out clips the rest.
    """

    def __init__(self, folder: str, size: int):
        """Reads the videos in a folder, scaled to squares of 1.5 times the frames' size.

        Raises:
          ValueError: the folder has no videos, or one that cannot be used; the message says which.
        """
        if not os.path.isdir(folder):
            raise ValueError(
                f"backgrounds={folder!r} is no folder; `python -m storm_jax.data.controlled.fetch"
                " --out=DIR` gets three clips"
            )
        names = sorted(n for n in os.listdir(folder) if n.lower().endswith(_ENDINGS))
        if not names:
            raise ValueError(
                f"backgrounds={folder!r} has no video (looked for {', '.join(_ENDINGS)});"
                " `python -m storm_jax.data.controlled.fetch --out=DIR` gets three clips"
            )
        self._films = []  # uint8 [pictures, side, side, 3] each
        files = {}
        for name in names:
            path = os.path.join(folder, name)
            try:
                seconds = min(probe(path).duration, _SECONDS)
                film, _ = decode(path, fps=_FPS, end=seconds, size=size * 3 // 2)
            except MediaError as error:
                raise ValueError(f"background {error}; remove the file") from error
            if len(film) < _SHORTEST:
                raise ValueError(
                    f"background {path} is too short: {len(film)} pictures at {_FPS:g} a second,"
                    f" at least {_SHORTEST} are needed; remove the file"
                )
            self._films.append(film)
            with open(path, "rb") as file:
                files[name] = hashlib.file_digest(file, "sha256").hexdigest()
        self.description = {"kind": "natural clips", "sha256": files}

    def draw(self, rng: np.random.Generator, groups: int, size: int, held_out: bool) -> np.ndarray:
        film = self._films[rng.integers(len(self._films))]
        cut = round(_TRAIN * len(film))
        film = film[cut:] if held_out else film[:cut]
        loop = np.concatenate([np.arange(len(film)), np.arange(len(film))[::-1]])
        start, step = rng.integers(len(loop)), rng.integers(1, 4)
        y, x = rng.integers(film.shape[1] - size + 1, size=2)
        pictures = film[loop[(start + step * np.arange(groups)) % len(loop)]]
        pictures = pictures[:, y : y + size, x : x + size].astype(np.float32)
        if rng.integers(2):
            pictures = pictures[:, :, ::-1]
        grey = pictures.mean(-1, keepdims=True)
        muted = grey + _SATURATION * (pictures - grey)
        return 128 + _CONTRAST * (muted - 128)
