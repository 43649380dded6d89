"""Ends a run whose numbers are lost, and says where that began."""

import math
import statistics
from collections import deque
from collections.abc import Mapping

import numpy as np

from storm_jax.config import TrainConfig


class TrainingFailed(RuntimeError):
    """Loss or gradients are not finite, the loss diverges, or processes loaded different rows."""


class Health:
    """Looks at the numbers of every step, in order.

    Attributes:
      skipped: updates that were left out since this process started.
    """

    def __init__(self, config: TrainConfig, parameters: list[str]):
        """`parameters`: names, in the order of the step's metric "grad_norms"."""
        self._config = config
        self._parameters = parameters
        self._losses: deque[float] = deque(maxlen=config.divergence.window)
        self._above = 0  # steps in a row
        self._in_a_row = 0  # steps whose update was skipped
        self.skipped = 0  # the same since this process started

    def check(self, step: int, values: Mapping[str, float], grad_norms: np.ndarray) -> str | None:
        """Is the run still well?

        Args:
          values: "loss", "grad_norm" and what else the step measures.
          grad_norms: norm of the gradient of every trained parameter.

        Returns:
          None, or what is wrong and what to do. The records of the batch are for the caller to add.
        """
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            self._in_a_row += 1
            limit = self._config.skip_nonfinite
            if self._in_a_row <= limit:
                self.skipped += 1
                return None
            skipped = f" ({limit} updates in a row were skipped before)" if limit else ""
            what = f"step {step}: {', '.join(broken)} not finite{skipped}"
            return f"{what}. {self._where(grad_norms)}"
        self._in_a_row = 0
        return self._diverging(step, values["loss"])

    def _where(self, grad_norms: np.ndarray) -> str:
        bad = [n for n, x in zip(self._parameters, grad_norms, strict=True) if not math.isfinite(x)]
        if not bad:
            return "The gradient of every parameter is finite, so it is the loss that is not."
        parts = sorted({name.split("/")[0] for name in bad})
        if len(bad) == len(self._parameters):
            return (
                "Gradients of all parameters are not finite, so the forward pass is at fault, or"
                " the loss: look at the records, lower train.optimizer.rates, or let"
                " train.skip_nonfinite leave such batches out"
            )
        shown = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        return (
            f"Gradients that are not finite: {shown}, in part {', '.join(parts)}. Lower"
            f" train.optimizer.rates.{parts[0]}, look at the records, or let train.skip_nonfinite"
            " leave such batches out"
        )

    def _diverging(self, step: int, loss: float) -> str | None:
        limit = self._config.divergence
        full = len(self._losses) == limit.window
        median = statistics.median(self._losses) if full else math.inf
        self._losses.append(loss)
        self._above = self._above + 1 if limit.factor and loss > limit.factor * median else 0
        if self._above < limit.steps:
            return None
        return (
            f"step {step}: the loss {loss:.4f} diverges: for {limit.steps} steps it has been above"
            f" {limit.factor:g} times the median of the {limit.window} steps before"
            f" ({median:.4f}; train.divergence). Lower train.optimizer.rates and start again from a"
            " checkpoint before that, or set train.divergence.factor=0"
        )
