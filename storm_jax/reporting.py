"""What a run says about its steps: numbers, bad records, and which records a step was made of."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from absl import logging

from storm_jax.config import RunConfig
from storm_jax.data.load import LoadMeter
from storm_jax.data.pipeline import Batch, BatchInfo
from storm_jax.data.sources import BadRecord
from storm_jax.flops import Work, peak_flops, training_flops
from storm_jax.metrics import MetricWriter, Progress, read_lines
from storm_jax.parallel import processes
from storm_jax.training.health import Health, TrainingFailed
from storm_jax.training.step import Metrics

ROWS_DIFFER = "rows_differ"
"""The metric of `parallel.same_rows`; it ends the run and is not written."""

# Bad records are judged as a share once this many records have been read.
_JUDGED_AFTER = 100


class Report:
    """Fetches the numbers of a step while the next one runs; judges them and writes them."""

    def __init__(
        self,
        config: RunConfig,
        parts: tuple[str, ...],
        parameters: list[str],
        writer: MetricWriter,
        bad_records: "BadRecords",
        start_step: int,
    ):
        """
        Args:
          parts: that are trained.
          parameters: names of `training.step.gradient_names`.
        """
        self._config, self._parts = config, parts
        self._writer, self._bad_records = writer, bad_records
        self._health = Health(config.train, parameters)
        # Rates are those of this process: its share of the batch on its share of the devices.
        peak = peak_flops(jax.devices()[0].device_kind)
        local_peak = None if peak is None else peak * jax.local_device_count()
        self._progress = Progress(start_step, config.train.steps, local_peak)
        self._load = LoadMeter()
        self._pending: tuple[int, Batch, Metrics, float] | None = None

    def add(self, step: int, batch: Batch, metrics: Metrics, waited: float) -> None:
        """Takes the numbers of a step that was started, and finishes the step before.

        Args:
          waited: seconds that the step waited for its batch.

        Raises:
          TrainingFailed: on all processes, with the step, the parameters and the records.
        """
        self._bad_records.add(batch.info)
        self.flush(logs=False)
        self._pending = step, batch, metrics, waited

    def flush(self, logs: bool = True) -> None:
        """Waits for the step that `add` was given last.

        Args:
          logs: writes its numbers whatever `train.log_every` says.
        """
        if self._pending is None:
            return
        (step, batch, metrics, waited), self._pending = self._pending, None
        self._load.add(batch.info.load)
        work = Work.of(batch.arrays)
        self._progress.add(
            work.tokens, work.frames, training_flops(self._config.model, work, self._parts), waited
        )
        values = {name: float(x) for name, x in metrics.items() if x.ndim == 0}
        differ = int(values.pop(ROWS_DIFFER, 0))
        wrong = _differ(step, differ) or self._health.check(
            step, values, np.asarray(metrics["grad_norms"])
        )
        if wrong is not None:
            records = "\n".join(processes.gathered(describe_rows(batch.info)))
            self.close()
            raise TrainingFailed(f"{wrong}\nThe batch of step {step}:\n{records}")
        if not logs and step % self._config.train.log_every:
            return
        values.update(self._progress.rates())
        values.update(self._load.rates())
        values["skipped_total"] = self._health.skipped
        values["bad_records"] = self._bad_records.count
        self._writer.write(step, values)
        self._progress.show(values)

    def close(self) -> None:
        """Leaves the progress bar as it stands."""
        self._progress.close()


def _differ(step: int, rows: int) -> str | None:
    if not rows:
        return None
    return (
        f"step {step}: {rows} row(s) are not the same on all the processes that hold them: a"
        " record has failed on one of them alone, and stands in its bad_records-PROCESS.jsonl. Mend"
        " the file there, or raise data.decode_timeout if it came too late; the same command goes"
        " on from the newest checkpoint"
    )


def describe_rows(info: BatchInfo) -> str:
    """The records in this process's rows, a line each row."""
    return "\n".join(
        f"  process {jax.process_index()} row {number}: "
        + (", ".join(f"{s.id} ({s.source})" for s in samples) or "empty")
        for number, samples in enumerate(info.rows)
    )


class RecordLog:
    """Which records the rows of each step hold: `records-PROCESS.jsonl`, if the config asks.

    A resumed run writes the steps again that it does again; the last line of a step counts.
    """

    def __init__(self, folder: Path, active: bool):
        self._file = None
        if active:
            path = folder / f"records-{jax.process_index()}.jsonl"
            torn = path.exists() and not path.read_text().endswith("\n")  # by a kill
            self._file = path.open("a")
            self._file.write("\n" if torn else "")

    def add(self, step: int, info: BatchInfo) -> None:
        """One line: the step, how many processes there are, and the ids in each local row."""
        if self._file is not None:
            rows = [[sample.id for sample in samples] for samples in info.rows]
            line = {"step": step, "processes": jax.process_count(), "rows": rows}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        if self._file is not None:
            self._file.close()


class BadRecords:
    """Counts bad records, logs each once, and stops the run when they are too many."""

    def __init__(self, folder: Path, max_fraction: float):
        process = jax.process_index()
        self._path = folder / f"bad_records{f'-{process}' if process else ''}.jsonl"
        self._max_fraction = max_fraction
        # A run that goes on has listed some before, maybe on other processes.
        listed = [row for path in folder.glob("bad_records*.jsonl") for row in read_lines(path)]
        self._seen = {(record["source"], record["id"]) for record in listed}
        self._torn = self._path.exists() and not self._path.read_text().endswith("\n")
        self._read = 0
        self._bad_read = 0

    @property
    def count(self) -> int:
        """Distinct bad records so far, on this process."""
        return len(self._seen)

    def add(self, info: BatchInfo) -> None:
        """Records of one training batch."""
        self.log(info.errors)
        self._bad_read += len(info.errors)
        self._read += len(info.errors) + sum(map(len, info.rows))
        if self._read < _JUDGED_AFTER or self._bad_read <= self._max_fraction * self._read:
            return
        raise RuntimeError(
            f"{self._bad_read} of {self._read} records read so far are bad, more than"
            f" data.max_bad_fraction={self._max_fraction}; they are listed in {self._path}."
            " Mend the data (python -m storm_jax.data.validate FILE), or raise the limit"
        )

    def log(self, errors: tuple[BadRecord, ...]) -> None:
        """Lists what has not been listed yet, without judging how many there are."""
        for error in errors:
            if (error.source, error.id) not in self._seen:
                self._seen.add((error.source, error.id))
                logging.warning("bad record %s in %s: %s", error.id, error.source, error.reason)
                with self._path.open("a") as file:
                    start = "\n" if self._torn else ""
                    file.write(start + json.dumps(dataclasses.asdict(error)) + "\n")
                self._torn = False
