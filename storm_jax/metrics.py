"""Where a run's numbers go: metrics.jsonl, TensorBoard and the progress bar. Process 0 writes."""

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from storm_jax.workdir import replace_text

# tensorboardX imports PyTorch wherever it is installed, for nothing that is used here: half the
# time that all imports of a run take together.
if "torch" in sys.modules:
    from tensorboardX import SummaryWriter
else:
    sys.modules["torch"] = None  # type: ignore[assignment]  # an ImportError, which it expects
    from tensorboardX import SummaryWriter

    del sys.modules["torch"]


class MetricWriter:
    """Writes scalars by step to `workdir/metrics.jsonl` and `workdir/tensorboard`.

    A resumed run goes on where its checkpoint stood: lines of later steps, which the interrupted
    run wrote and this one will write again, are removed.

    Attributes:
      kept: the newest line with a "goodput" at or before `start_step`, None without one.
      last: the newest line of all, the removed ones among them.
    """

    def __init__(self, workdir: Path, start_step: int):
        self.kept: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        kept = []
        for row in read_lines(path):
            self.last = row
            if row["step"] <= start_step:
                kept.append(json.dumps(row) + "\n")
                self.kept = row if "goodput" in row else self.kept
        replace_text(path, "".join(kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds one line, with the Unix time; values are Python numbers, null if not finite."""
        if not self._active:
            return
        values = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        line = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Finishes both files."""
        if self._active:
            self._file.close()
            self._board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a line that a kill cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


class Progress:
    """The progress bar of training, and the rates since the last `rates` call."""

    def __init__(self, start_step: int, steps: int, peak: float | None):
        """`peak` is the FLOP/s of all devices together, None where it is not known."""
        quiet = jax.process_index() != 0
        self._bar = tqdm(
            total=steps, initial=start_step, desc="train", unit="step", disable=quiet, smoothing=0.1
        )
        self._peak = peak
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0
        self._tokens, self._frames, self._flops = 0, 0, 0.0

    def add(self, tokens: int, frames: int, flops: float, waited: float) -> None:
        """Counts one step; `waited` is the time, in s, that the step waited for its batch."""
        self._bar.update()
        self._steps += 1
        self._tokens += tokens
        self._frames += frames
        self._flops += flops
        self._waited += waited

    def rates(self) -> dict[str, float]:
        """Mean rates of this process's steps since the last call; times in s."""
        elapsed = time.perf_counter() - self._since
        rates = {
            "step_seconds": elapsed / self._steps,
            "tokens_per_second": self._tokens / elapsed,
            "frames_per_second": self._frames / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        if self._peak is not None:
            rates["mfu"] = self._flops / elapsed / self._peak
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0
        self._tokens, self._frames, self._flops = 0, 0, 0.0
        return rates

    def show(self, metrics: dict[str, float]) -> None:
        """Puts the numbers that matter behind the bar."""
        shown = {
            "loss": f"{metrics['loss']:.4f}",
            "acc": f"{metrics['accuracy']:.2f}",
            "s/step": f"{metrics['step_seconds']:.3f}",
            "tok/s": f"{metrics['tokens_per_second']:,.0f}",
            "frames/s": f"{metrics['frames_per_second']:,.0f}",
        }
        if "mfu" in metrics:
            shown["mfu"] = f"{metrics['mfu']:.1%}"
        if metrics["bad_records"]:
            shown["bad"] = f"{metrics['bad_records']:.0f}"
        self._bar.set_postfix(shown, refresh=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()
