"""Table 13, latency: measurements of benchmarks/latency.py on real shapes beside the paper's."""

import json

from storm_jax.evidence_grid.paper import TABLE13
from storm_jax.evidence_grid.recipe import EvidenceError
from storm_jax.evidence_grid.tables import Table

# Other devices give other milliseconds; the claim is about ratios on one device. It is reproduced
# where a ratio is at least this share of the paper's.
SHARE = 0.9
_SAME = ("size", "quantization", "jax")  # of all runs: else ratios compare other things too
LARGEST_SHARE = 4.4  # percent of the latency that the paper's projector takes at compression 1


class Latency:
    """Measurements by (frames, compression).

    Attributes:
      ms: overall, LLM, vision tower, projector, milliseconds.
      device: that they were measured on.
    """

    def __init__(self, path: str):
        """Reads what benchmarks/latency.py wrote.

        Raises:
          EvidenceError: the file is not there, is none of that kind, or its runs cannot be compared
            with one another.
        """
        try:
            with open(path, encoding="utf-8") as file:
                runs = json.load(file)["runs"]
            self.ms: dict[tuple[int, int], tuple[float, ...]] = {}
            self.device: dict[tuple[int, int], str] = {}
            for run in runs:
                for field in _SAME:
                    if run[field] != runs[0][field]:
                        raise EvidenceError(
                            f"--latency={path} has runs of {field}={runs[0][field]!r} and of"
                            f" {run[field]!r}, whose milliseconds do not compare: keep those of one"
                        )
                key = (run["frames"], run["temporal_pool"] * run["temporal_sampling"])
                if key in self.ms:
                    raise EvidenceError(
                        f"--latency={path} has two runs of {key[0]} frames and {key[1]} times fewer"
                        " tokens: remove one"
                    )
                parts = ("first token", "prefill", "vit", "temporal")
                self.ms[key] = tuple(run[part]["ms"] for part in parts)
                self.device[key] = run["device"]
        except EvidenceError:
            raise
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise EvidenceError(
                f"--latency={path} cannot be used ({type(error).__name__}: {error}); it is a JSON"
                " file as benchmarks/results/table13.json"
            ) from error

    def ratio(self, frames: int, compression: int) -> float | None:
        """How many times faster than without compression; None: not measured on one device."""
        one, other = (frames, 1), (frames, compression)
        if one in self.ms and self.device[one] == self.device.get(other):
            return self.ms[one][0] / self.ms[other][0]
        return None

    def table(self) -> Table:
        """Every row of the paper's table; rows name their device where there are several."""
        devices = sorted(set(self.device.values()))
        several = len(devices) > 1
        rows: list[tuple[str, ...]] = []
        for (frames, compression), theirs in TABLE13.items():
            ours = self.ms.get((frames, compression))
            here = tuple(f"{ms:.0f}" for ms in ours) if ours else ("not run", "", "", "")
            ratio = self.ratio(frames, compression)
            paper = TABLE13[(frames, 1)][0] / theirs[0]
            ratios = ("", "")
            if compression > 1:
                ratios = ("" if ratio is None else f"{ratio:.2f}", f"{paper:.2f}")
            device = (self.device.get((frames, compression), ""),) * several
            rows.append(
                (str(frames), str(compression), *here, *device, f"{theirs[0]:.0f}", *ratios)
            )
        return Table(
            "table13",
            f"Table 13: time to the first token, ms ({', '.join(devices)}; the paper: A100)",
            (
                "frames",
                "compression",
                "overall",
                "decoder",
                "ViT",
                "temporal encoder",
                *("device",) * several,
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
                reason = f"reproduced means at least {SHARE:.0%} of the paper's factor"
                if ours is None and {(frames, 1), (frames, compression)} <= set(self.ms):
                    reason = "the two were measured on different devices"
                rows.append(
                    (
                        "13",
                        f"{frames} frames, {compression} times fewer tokens: faster by a factor",
                        f"{paper:.2f}",
                        "" if ours is None else f"{ours:.2f}",
                        "",
                        f"**{verdict}**",
                        reason,
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
