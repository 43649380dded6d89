"""Table 13, latency: measurements of benchmarks/latency.py on real shapes beside the paper's."""

import json

from storm_jax.evidence_grid.paper import TABLE13
from storm_jax.evidence_grid.recipe import EvidenceError
from storm_jax.evidence_grid.tables import Table

# Other devices give other milliseconds; the claim is about ratios. It is reproduced where a ratio
# is at least this share of the paper's.
SHARE = 0.9
LARGEST_SHARE = 4.4  # percent of the latency that the paper's projector takes at compression 1


class Latency:
    """Milliseconds by (frames, compression): overall, LLM, vision tower, projector."""

    def __init__(self, path: str):
        """Reads what benchmarks/latency.py wrote.

        Raises:
          EvidenceError: the file is not there, or is none of that kind.
        """
        try:
            with open(path, encoding="utf-8") as file:
                runs = json.load(file)["runs"]
            self.ms = {
                (run["frames"], run["temporal_pool"] * run["temporal_sampling"]): tuple(
                    run[part]["ms"] for part in ("first token", "prefill", "vit", "temporal")
                )
                for run in runs
            }
            self.devices = sorted({run["device"] for run in runs})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvidenceError(
                f"--latency={path} cannot be used ({type(error).__name__}: {error}); it is a JSON"
                " file as benchmarks/results/table13.json"
            ) from error

    def ratio(self, frames: int, compression: int) -> float | None:
        """How many times faster than without compression; None: not measured."""
        if {(frames, 1), (frames, compression)} <= set(self.ms):
            return self.ms[(frames, 1)][0] / self.ms[(frames, compression)][0]
        return None

    def table(self) -> Table:
        """Every row of the paper's table."""
        rows: list[tuple[str, ...]] = []
        for (frames, compression), theirs in TABLE13.items():
            ours = self.ms.get((frames, compression))
            here = tuple(f"{ms:.0f}" for ms in ours) if ours else ("not run", "", "", "")
            ratio = self.ratio(frames, compression)
            paper = TABLE13[(frames, 1)][0] / theirs[0]
            ratios = ("", "")
            if compression > 1:
                ratios = ("" if ratio is None else f"{ratio:.2f}", f"{paper:.2f}")
            rows.append((str(frames), str(compression), *here, f"{theirs[0]:.0f}", *ratios))
        return Table(
            "table13",
            f"Table 13: time to the first token, ms ({', '.join(self.devices)}; the paper: A100)",
            (
                "frames",
                "compression",
                "overall",
                "decoder",
                "ViT",
                "temporal encoder",
                "paper, overall",
                "times faster",
                "paper, times faster",
            ),
            rows,
        )

    def claims(self) -> list[tuple[str, ...]]:
        """Rows for the table of claims."""
        rows: list[tuple[str, ...]] = []
        for frames in (128, 256):
            for compression in (4, 8):
                paper = TABLE13[(frames, 1)][0] / TABLE13[(frames, compression)][0]
                ours = self.ratio(frames, compression)
                good = ours is not None and ours >= SHARE * paper
                verdict = "not run" if ours is None else "reproduced" if good else "not reproduced"
                rows.append(
                    (
                        "13",
                        f"{frames} frames, {compression} times fewer tokens: faster by a factor",
                        f"{paper:.2f}",
                        "" if ours is None else f"{ours:.2f}",
                        "",
                        f"**{verdict}**",
                        f"reproduced means at least {SHARE:.0%} of the paper's factor",
                    )
                )
        for frames in (128, 256):
            ours = self.ms.get((frames, 1))
            share = None if ours is None else 100 * ours[3] / ours[0]
            theirs = TABLE13[(frames, 1)]
            good = share is not None and share <= LARGEST_SHARE
            verdict = "not run" if share is None else "reproduced" if good else "not reproduced"
            rows.append(
                (
                    "13",
                    f"{frames} frames: the temporal encoder's share of the latency, %",
                    f"{100 * theirs[3] / theirs[0]:.1f}",
                    "" if share is None else f"{share:.1f}",
                    "",
                    f"**{verdict}**",
                    f"reproduced means at most {LARGEST_SHARE} %, the most in the paper's table",
                )
            )
        return rows
