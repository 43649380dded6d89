"""Data sets, opened: which records can be used, how long they are, and why the others cannot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from storm_jax.config import DataConfig, ModelConfig, SourceConfig
from storm_jax.data import video
from storm_jax.data.open_records import Part, open_records
from storm_jax.data.packing import Limits, SampleError, check_fits
from storm_jax.data.planning import Lengths
from storm_jax.data.probes import load_or_probe
from storm_jax.data.records import RecordError, RecordSet
from storm_jax.data.token_cache import TokenCache, open_or_build

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class DataError(ValueError):
    """Data sets that no batch can be made of."""


@dataclass(frozen=True)
class BadRecord:
    """A record that was left out, and why."""

    source: str
    id: str
    reason: str


@dataclass(frozen=True)
class Source:
    """A data set, and which of its records are used.

    Attributes:
      config: number of the `SourceConfig` that names it; a mixture names several.
      numbers: of the records used, int64 [n], ascending.
      lengths: of these, in the same order.
      bad: those that cannot be used.
    """

    config: int
    records: RecordSet
    cache: TokenCache
    numbers: np.ndarray
    lengths: Lengths
    bad: tuple[BadRecord, ...]


def open_sources(
    field: str,
    configs: Sequence[SourceConfig],
    data: DataConfig,
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerFast",
) -> list[Source]:
    """Opens data sets: tokenizes and probes what no cache beside them holds yet.

    Args:
      field: "train" or "eval", for error messages.

    Raises:
      RecordError: a file is missing, damaged as a whole, or of no known format.
      DataError: no data set is named, one has no usable record, or of all records a share above
        data.max_bad_fraction is bad.
    """
    if not configs:
        raise DataError(f"data.{field} names no data set")
    sources = [
        _open(number, part, data, model, tokenizer)
        for number, config in enumerate(configs)
        for part in open_records(config, data.seed)
    ]
    bad = [record for source in sources for record in source.bad]
    total = len(bad) + sum(len(source.numbers) for source in sources)
    if len(bad) > data.max_bad_fraction * total:
        raise DataError(
            f"data.{field}: {len(bad)} of {total} records are bad, more than"
            f" data.max_bad_fraction={data.max_bad_fraction:g} allows:\n{_listing(bad)}\nRepair or"
            " remove them (python -m storm_jax.data.validate lists all), or raise the limit"
        )
    for source in sources:
        if not len(source.numbers):
            listing = f"\n{_listing(source.bad)}" if source.bad else ""
            raise DataError(f"{source.records.path} has no usable record{listing}")
    return sources


def _listing(bad: Sequence[BadRecord], most: int = 10) -> str:
    lines = [f"  {record.source}, {record.id}: {record.reason}" for record in bad[:most]]
    if len(bad) > most:
        lines.append(f"  and {len(bad) - most} more")
    return "\n".join(lines)


def _open(
    config: int,
    part: Part,
    data: DataConfig,
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerFast",
) -> Source:
    records = part.records
    cache = open_or_build(records, tokenizer, data.chat_template)
    reasons: dict[int, str] = dict(cache.errors)  # record number -> why it is bad

    # By medium, then summed with arrays: a million records are too many for a loop over each.
    media, which = cache.distinct_media()
    chosen = np.zeros(len(records), bool)
    chosen[part.chosen] = True
    wanted = np.unique(which[np.repeat(chosen, cache.media_counts())]).tolist()
    probes = load_or_probe(records, [media[i] for i in wanted])
    media_frames = np.zeros(len(media), np.int64)
    media_errors: dict[int, str] = {}
    for i in wanted:
        try:
            media_frames[i] = video.frame_count(probes[media[i]], media[i], data.frames)
        except video.MediaError as error:
            media_errors[i] = str(error)
    media_tokens = np.array([model.visual_tokens(f) for f in media_frames.tolist()], np.int64)
    ends = np.cumsum(cache.media_counts())
    starts = ends - cache.media_counts()

    def per_record(values: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0], np.cumsum(values)])
        return sums[ends] - sums[starts]

    failed = np.zeros(len(media), np.int64)
    failed[list(media_errors)] = 1
    for number in np.flatnonzero(per_record(failed[which])).tolist():
        its = which[starts[number] : ends[number]].tolist()
        reasons[number] = "; ".join(media_errors[i] for i in its if i in media_errors)

    text_tokens = cache.text_tokens()
    tokens = text_tokens + per_record(media_tokens[which])
    frames = per_record(media_frames[which])
    limits = Limits(data.sequence_length, data.row_frames)
    for number in np.flatnonzero((tokens > limits.tokens) | (frames > limits.frames)).tolist():
        its = media_frames[which[starts[number] : ends[number]]].tolist()
        try:
            check_fits(int(text_tokens[number]), its, model, limits)
        except SampleError as error:
            reasons.setdefault(number, str(error))

    reasons = {number: reason for number, reason in reasons.items() if chosen[number]}
    chosen[list(reasons)] = False
    numbers = np.flatnonzero(chosen)
    lengths = Lengths(tokens[numbers].astype(np.int32), frames[numbers].astype(np.int32))
    bad = [_bad_record(records, number, reasons[number]) for number in sorted(reasons)]
    return Source(config, records, cache, numbers, lengths, tuple(bad))


def _bad_record(records: RecordSet, number: int, reason: str) -> BadRecord:
    try:
        record = records[number]
    except RecordError:
        return BadRecord(records.name, f"record {number}", reason)
    return BadRecord(record.source, record.id, reason)
