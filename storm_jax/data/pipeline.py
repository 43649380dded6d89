"""Batches for training and evaluation: from record files to arrays, with Grain.

    record files ── token cache, probes ──▶ lengths ──▶ plan: which samples are row i
    row i ──▶ read, decode, lay out ──▶ local batch = rows p, p + P, p + 2P, ... of the global one

The position in the data is the step alone: step s of a run is made of the rows s * batch to
(s + 1) * batch of the plan, of which share p of P are each P-th from p on. A process loads one
share: the rows that its devices hold. Where a model axis of the mesh runs through several
processes, these hold the same rows and load the same share. So a run resumes with `start_step`, on
any number of processes and workers, with the same global batches, and every process sees the same
number of them. None of Grain's own state is kept: it depends on the number of workers and
processes.

A record that fails is never raised and never moves another one: its row keeps its place and lacks
that sample, and the failure is in `BatchInfo.errors`. What is known to fail before anything is
decoded (unreadable, no probe, too long) is left out of the plan, and is in `Batches.known_bad`.
"""

import faulthandler
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from storm_jax.config import DataConfig, ModelConfig
from storm_jax.data import video
from storm_jax.data.load import Load, Stopwatch
from storm_jax.data.packing import Limits, Row, RowBuilder, Sample, SampleError
from storm_jax.data.packing import row_bytes as bytes_of_row
from storm_jax.data.planning import EndlessPlan, OrderedPlan, Plan, joined, subset
from storm_jax.data.records import RecordError
from storm_jax.data.sources import BadRecord, DataError, Source, open_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class SampleInfo:
    """Where a sample comes from."""

    id: str
    source: str
    task: str


@dataclass(frozen=True)
class BatchInfo:
    """What the arrays of a batch do not say.

    Attributes:
      rows: for each row of this process its samples; number s of a row is segment s in the arrays.
      errors: records of these rows that failed while they were loaded.
      load: what loading them cost; not compared.
    """

    rows: tuple[tuple[SampleInfo, ...], ...]
    errors: tuple[BadRecord, ...]
    load: Load = field(default=Load(), compare=False)


@dataclass(frozen=True)
class Batch:
    """The rows of one step that this process holds.

    Attributes:
      arrays: those of `storm_jax.data.packing`, each with a leading axis of local rows.
    """

    arrays: Row
    info: BatchInfo


class Batches:
    """An iterator over batches; also says what was left out before the first.

    Attributes:
      known_bad: records that no batch will hold, with the reasons.
      usable: number of the other records.
      steps: number of batches that are still to come.
      fingerprint: of the usable records and their lengths. Equal plans need equal fingerprints: on
        every process (one that does not see a file sees other rows), and when a run is resumed.
    """

    def __init__(self, dataset: grain.IterDataset, steps: int, sources: Sequence[Source]):
        self._iterators = [iter(dataset)]  # none once closed
        # Also when the program ends: Grain's own clean-up comes when its modules are gone already.
        self._finalize = weakref.finalize(self, _close, self._iterators)
        self.steps = steps
        self.usable = sum(len(source.numbers) for source in sources)
        self.known_bad = tuple(bad for source in sources for bad in source.bad)
        digest = hashlib.blake2b(digest_size=8)
        for source in sources:
            for array in (source.numbers, source.lengths.tokens, source.lengths.frames):
                digest.update(np.int64(len(array)).tobytes() + array.tobytes())
        self.fingerprint = digest.hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._iterators:
            raise StopIteration
        batch = next(self._iterators[0])
        self.steps -= 1
        return batch

    def close(self):
        """Ends the threads and worker processes that read ahead; no batch comes after it."""
        self._finalize()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_):
        self.close()


def _close(iterators: list[grain.DatasetIterator]):
    while iterators:
        iterators.pop().close()


def train_batches(
    data: DataConfig,
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    batch: int,
    steps: int,
    start_step: int = 0,
    share_index: int = 0,
    share_count: int = 1,
) -> Batches:
    """Shuffled batches of the mixture `data.train`, for the steps from `start_step` to `steps`.

    Args:
      tokenizer: from `text.load_tokenizer(data.tokenizer)`.
      batch: rows of the global batch; this process gets batch / share_count of them.
      share_index, share_count: which share of the rows this process loads, of how many.

    Raises:
      RecordError, DataError: see `sources.open_sources`.
      ValueError: the shares do not divide the batch, or the weights make no mixture.
    """
    share = _Share(batch, start_step, steps, share_index, share_count)
    sources = open_sources("train", data.train, data, model, tokenizer)
    of_config = [
        [source.lengths for source in sources if source.config == number]
        for number in range(len(data.train))
    ]
    plan = EndlessPlan(
        [joined(lengths) for lengths in of_config],
        [source.weight for source in data.train],
        Limits(data.sequence_length, data.row_frames),
        pack=data.pack,
        seed=data.seed,
    )
    plan.row(start_step * batch)  # before workers get their copies: they need not catch up
    dataset = _dataset(_Rows(sources, plan, data, model, share), data, model, share)
    return Batches(dataset, max(0, steps - start_step), sources)


def eval_batches(
    data: DataConfig,
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    batch: int,
    samples: int,
    share_index: int = 0,
    share_count: int = 1,
) -> Batches:
    """Each record of `data.eval` once, in order; empty rows fill up the last batch.

    Args:
      samples: if there are more usable records, so many are drawn (always the same).

    See `train_batches` for the other arguments and for errors.
    """
    sources = open_sources("eval", data.eval, data, model, tokenizer)
    lengths = joined([source.lengths for source in sources])
    chosen = subset(len(lengths), samples, data.seed)
    limits = Limits(data.sequence_length, data.row_frames)
    plan = OrderedPlan(chosen, lengths, limits, pack=data.pack)
    steps = -(-plan.rows // batch)
    share = _Share(batch, 0, steps, share_index, share_count)
    dataset = _dataset(_Rows(sources, plan, data, model, share), data, model, share)
    return Batches(dataset, steps, sources)


# ------------------------------------------------------------------------------------ loading rows


class _Share:
    """The rows of a run that one process loads."""

    def __init__(self, batch: int, start: int, stop: int, share_index: int, share_count: int):
        if batch % share_count:
            raise ValueError(
                f"a batch of {batch} rows cannot be cut into {share_count} equal shares"
            )
        if not 0 <= share_index < share_count:
            raise ValueError(f"share_index={share_index} of {share_count} shares")
        self.local = batch // share_count
        self._batch, self._start, self._stop = batch, start, stop
        self._index, self._count = share_index, share_count

    def __len__(self) -> int:
        return max(0, self._stop - self._start) * self.local

    def row(self, number: int) -> int:
        """Number in the plan of the process's row `number`."""
        step, place = divmod(number, self.local)
        first = (self._start + step) * self._batch
        return first + self._index + place * self._count


@dataclass(frozen=True)
class _RowInfo:
    """A row's part of `BatchInfo`."""

    samples: tuple[SampleInfo, ...]
    errors: tuple[BadRecord, ...]
    load: Load


class _Rows:
    """The process's rows, with random access: the source of the Grain pipeline."""

    def __init__(
        self,
        sources: Sequence[Source],
        plan: Plan,
        data: DataConfig,
        model: ModelConfig,
        share: _Share,
    ):
        self._records = [source.records for source in sources]
        self._caches = [source.cache for source in sources]
        self._numbers = np.concatenate([source.numbers for source in sources])
        self._tokens = np.concatenate([source.lengths.tokens for source in sources])
        self._frames = np.concatenate([source.lengths.frames for source in sources])
        self._ends = np.cumsum([len(source.numbers) for source in sources])
        self._plan, self._data, self._model, self._share = plan, data, model, share
        self._limits = Limits(data.sequence_length, data.row_frames)

    def __len__(self) -> int:
        return len(self._share)

    def __getitem__(self, index: int) -> tuple[Row, _RowInfo]:
        members = self._plan.row(self._share.row(int(index)))
        builder = RowBuilder(self._model, self._limits)
        samples: list[SampleInfo] = []
        errors: list[BadRecord] = []
        watch, frames = Stopwatch(), 0
        for place, member in enumerate(members):
            following = members[place + 1 :]
            reserved = Limits(
                int(self._tokens[following].sum()), int(self._frames[following].sum())
            )
            source = int(np.searchsorted(self._ends, member, side="right"))
            info = SampleInfo(f"record {self._numbers[member]}", self._records[source].name, "")
            try:
                records = self._records[source]
                record = records[int(self._numbers[member])]
                info = SampleInfo(record.id, record.source, record.task)
                size, timeout = self._model.vit.image_size, self._data.decode_timeout
                media = tuple(
                    video.sample(records.opened(medium), self._data.frames, size, timeout)[0]
                    for medium in record.media
                )
                frames += sum(map(len, media))
                text = self._caches[source].text(int(self._numbers[member]))
                builder.add(Sample(text, media), reserved)
            except Exception as error:  # decoders have many: none may end a run that lasts weeks
                known = isinstance(error, (RecordError, video.MediaError, SampleError))
                reason = str(error) if known else f"{type(error).__name__}: {error}"
                errors.append(BadRecord(info.source, info.id, reason))
            else:
                samples.append(info)
        return builder.row, _RowInfo(tuple(samples), tuple(errors), watch.load(frames))


def _collate(rows: Sequence[tuple[Row, _RowInfo]]) -> Batch:
    arrays = {name: np.stack([row[name] for row, _ in rows]) for name in rows[0][0]}
    infos = [info for _, info in rows]
    return Batch(
        arrays,
        BatchInfo(
            rows=tuple(info.samples for info in infos),
            errors=tuple(error for info in infos for error in info.errors),
            load=sum((info.load for info in infos), Load()),
        ),
    )


# ------------------------------------------------------------------------------------------- Grain


@dataclass(frozen=True)
class _Depths:
    """How much is read ahead of its use.

    Attributes:
      batches: stacked batches that wait.
      rows: single rows that are being read or wait.
    """

    batches: int
    rows: int


def _depths(megabytes: int, row_bytes: int, local_rows: int) -> _Depths:
    """Cuts the memory budget (MiB) into batches and rows; at least one of each whatever it is.

    Rows are where reading ahead pays, for files take different times; more than 16 batches of them
    would only hold memory.
    """
    rows = (megabytes << 20) // row_bytes
    batches = min(2, max(1, rows // (4 * local_rows)))
    return _Depths(batches, max(1, min(rows - batches * local_rows, 16 * local_rows)))


def _dataset(
    rows: _Rows, data: DataConfig, model: ModelConfig, share: _Share
) -> grain.IterDataset[Batch]:
    """Reads rows ahead in threads or worker processes, and stacks them in one further thread.

    Rows are batched after they come out of the workers: Grain gives worker w of W each W-th
    element, and batching before that would make other batches for other W.
    """
    row_bytes = bytes_of_row(model, Limits(data.sequence_length, data.row_frames))
    depths = _depths(data.prefetch_megabytes, row_bytes, share.local)
    dataset = grain.MapDataset.source(rows)
    if data.workers == 0:
        threads = min(depths.rows, os.cpu_count() or 1, 16)
        dataset = dataset.to_iter_dataset(grain.ReadOptions(threads, depths.rows))
    else:
        # A row waits in one of three places: in the worker's threads, in the queue from it, and in
        # the queue in front of the interleaving of all workers.
        each = max(1, depths.rows // (3 * data.workers))
        each = min(each, _shared_memory_rows(row_bytes, data.workers))
        dataset = dataset.to_iter_dataset(grain.ReadOptions(min(2, each), each))
        if not flags.FLAGS.is_parsed():  # Grain reads flags of its own; commands have parsed them
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=each),
            worker_init_fn=_start_worker,
        )
    dataset = dataset.batch(share.local, drop_remainder=True, batch_fn=_collate)
    return ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=depths.batches)


def _shared_memory_rows(row_bytes: int, workers: int) -> int:
    """Rows for each queue of each worker (each has two) that fit the shared memory of the machine.

    Raises:
      DataError: not one fits. Without this check the workers would die of a bus error.
    """
    if not os.path.isdir("/dev/shm"):
        return sys.maxsize
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    rows = free // (2 * workers * row_bytes) - 1  # one that is just written
    if rows < 1:
        raise DataError(
            f"/dev/shm has {free >> 20} MiB free, but {workers} data workers need at least"
            f" {4 * workers * row_bytes >> 20} MiB for their rows: set data.workers=0, use fewer,"
            " or enlarge it (docker run --shm-size=16g)"
        )
    return rows


def _start_worker(_worker: int, _workers: int):
    # A worker that touched the TPU or GPU would take it, or its memory, from the main process.
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax = sys.modules.get("jax")  # Grain imports it, and it has read the environment by then
    if jax is not None:
        jax.config.update("jax_platforms", "cpu")
    # A signal to the whole process group: the main process saves, and needs rows until it has.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)  # the watchdog of training asks for stacks
    # A worker whose parent was killed would wait for ever to hand over its next row.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
