"""Where a run's numbers go: metrics.jsonl, TensorBoard and the progress bar. Process 0 writes."""

import json
import math
import time
from pathlib import Path

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm


class MetricWriter:
    """Writes scalars by step to `workdir/metrics.jsonl` and `workdir/tensorboard`.

    A resumed run goes on where its checkpoint stood: lines of later steps, which the interrupted
    run wrote and this one will write again, are removed.
    """

    def __init__(self, workdir: Path, start_step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    step = json.loads(line)["step"]
                except json.JSONDecodeError:
                    continue  # cut off in mid-write when the run was killed
                if step <= start_step:
                    kept.append(line + "\n")
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds one line; values are Python numbers."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Finishes both files."""
        if self._active:
            self._file.close()
            self._board.close()


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


def require_finite(step: int, metrics: dict[str, float]) -> None:
    """Stops a run whose numbers are lost.

    Raises:
      FloatingPointError: names the step and the metrics that are not finite.
    """
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise FloatingPointError(
            f"step {step}: {', '.join(broken)} not finite; lower train.optimizer.rates, or look at"
            " this batch: the data order is deterministic, so the same command reaches it again"
        )
