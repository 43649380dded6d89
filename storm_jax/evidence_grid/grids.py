"""The grids: which models each of the paper's tables compares, and how they are trained."""

import ast
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from storm_jax.config import ConfigError, from_mapping
from storm_jax.evidence_grid.recipe import (
    EvidenceError,
    Mixer,
    Point,
    Recipe,
    Sizes,
    Stage,
    Videos,
)

CONTROLS: tuple[Mixer, ...] = ("mlp", "attention", "convolution")


@dataclass(frozen=True)
class Grid:
    """A named grid.

    Attributes:
      parts: which points belong to which part; several parts share points.
      short, reduced: the first two stages, the same for all points.
      long: the last stage, by the number of frames.
    """

    name: str
    parts: dict[str, tuple[Point, ...]]
    videos: Videos
    sizes: Sizes
    short: Stage
    reduced: Stage
    long: dict[int, Stage]
    seeds: int

    def changed(self, settings: Sequence[str]) -> "Grid":
        """With fields of `Videos`, `Sizes`, `Stage` and the number of seeds set.

        Args:
          settings: "videos.train=500", "sizes.width=128", "short.steps=1000", "long.rate=1e-3" (at
            every number of frames), "seeds=3".

        Raises:
          EvidenceError: there is no such field, or the value is of another type.
        """
        tree = dataclasses.asdict(self)
        for text in settings:
            path, _, value = text.partition("=")
            group, _, name = path.partition(".")
            places = {"long": list(tree["long"].values())}.get(group, [tree.get(group)])
            if path == "seeds":
                places, name = [tree], path
            if group not in ("videos", "sizes", "short", "reduced", "long", "seeds") or any(
                name not in place for place in places
            ):
                raise EvidenceError(
                    f"--set={text}: write videos.F=, sizes.F=, short.F=, reduced.F=, long.F= with a"
                    " field F of these (evidence_grid/recipe.py), or seeds="
                )
            try:
                found = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found = value
            for place in places:
                place[name] = found
        try:
            return dataclasses.replace(
                self,
                videos=from_mapping(Videos, tree["videos"], "videos"),
                sizes=from_mapping(Sizes, tree["sizes"], "sizes"),
                short=from_mapping(Stage, tree["short"], "short"),
                reduced=from_mapping(Stage, tree["reduced"], "reduced"),
                long={f: from_mapping(Stage, s, "long") for f, s in tree["long"].items()},
                seeds=tree["seeds"],
            )
        except ConfigError as error:
            raise EvidenceError(f"--set: {error}") from error

    def recipes(self, part: str) -> list[Recipe]:
        """Of one part, or of all for "", in the order of their beginning.

        Raises:
          EvidenceError: there is no such part.
        """
        if part and part not in self.parts:
            raise EvidenceError(
                f"--part={part}: grid {self.name} has the parts {', '.join(self.parts)}"
            )
        chosen = self.parts.values() if not part else [self.parts[part]]
        points = sorted({p for points in chosen for p in points}, key=_place)
        return [
            Recipe(
                p,
                self.videos,
                self.sizes,
                self.short,
                self.reduced,
                self.long[p.frames],
                self.seeds,
            )
            for p in points
        ]


def _place(point: Point) -> tuple:
    """When a point is begun: what table 4 needs first, points that share a second stage apart."""
    base = point.mixer in ("none", "mamba") and point.direction == "bidirectional"
    extreme = point.spatial_pool == 1 and point.frames in (8, 128)
    last = point.spatial_pool > 1
    return not (base and extreme), last, -point.frames, not base, point.name


def _table4() -> tuple[Point, ...]:
    """8 frames unpooled, 32 and 128 with temporal pooling, as in the paper's tables 4 and 10."""
    mixers: tuple[Mixer, ...] = ("none", "mamba", *CONTROLS)
    return tuple(
        Point(mixer, 1 if frames == 8 else 4, 1, frames)
        for mixer in mixers
        for frames in (8, 32, 128)
    )


def _table5() -> tuple[Point, ...]:
    mixers: tuple[Mixer, ...] = ("none", "mamba")
    return tuple(
        Point(mixer, temporal, spatial, 32)
        for mixer in mixers
        for temporal in (1, 4)
        for spatial in (1, 2)
    )


def _table3() -> tuple[Point, ...]:
    return tuple(
        Point("mamba", temporal, spatial, frames)
        for temporal, spatial in ((4, 1), (1, 2))
        for frames in (32, 128)
    )


def _table7() -> tuple[Point, ...]:
    return tuple(
        Point(mixer, 4, 1, frames, direction)
        for mixer, direction in (
            ("none", "bidirectional"),
            ("mamba", "forward"),
            ("mamba", "bidirectional"),
        )
        for frames in (32, 128)
    )


CORE = Grid(
    name="core",
    parts={"table4": _table4(), "table5": _table5(), "table3": _table3(), "table7": _table7()},
    videos=Videos(
        families=("blink", "order"),
        frames=128,
        scales=(4, 16, 64),
        train=1600,
        test=400,
        short_train=8000,
        short_frames=8,
        short_scales=(4,),
        backgrounds="still",
    ),
    sizes=Sizes(dt_min=0.03, dt_max=0.5),
    short=Stage(steps=0, batch=64, rate=2e-3),
    reduced=Stage(steps=1500, batch=64, rate=2e-3),
    long={frames: Stage(steps=600, batch=32, rate=1e-3) for frames in (8, 32, 128)},
    seeds=5,
)

# Exercises every piece in about two minutes on two cores; says nothing about the claims.
SMOKE = Grid(
    name="smoke",
    parts={"table4": (Point("none", 4, 1, 32), Point("mamba", 4, 1, 32))},
    videos=Videos(
        families=("blink", "colour"),
        frames=32,
        scales=(4, 16),
        train=48,
        test=16,
        short_train=32,
        short_frames=8,
        short_scales=(4,),
    ),
    sizes=Sizes(width=32),
    short=Stage(steps=0, batch=8, rate=2e-3),
    reduced=Stage(steps=4, batch=8, rate=2e-3),
    long={frames: Stage(steps=4, batch=8, rate=1e-3) for frames in (32,)},
    seeds=2,
)

GRIDS = {grid.name: grid for grid in (CORE, SMOKE)}
