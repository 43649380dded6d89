"""Where each record of a JSONL or JSON file starts and ends, without holding the records."""

import json
from typing import BinaryIO

import numpy as np

_CHUNK = 1 << 24  # bytes read at once


def line_spans(file: BinaryIO) -> np.ndarray:
    """Where the lines of a file start and end, blank lines left out: int64 [records, 2]."""
    ends, offset, last = [], 0, b"\n"
    while chunk := file.read(_CHUNK):
        ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10).astype(np.int64) + offset)
        offset += len(chunk)
        last = chunk[-1:]
    if last != b"\n":
        ends.append(np.array([offset], np.int64))
    stops = np.concatenate(ends) if ends else np.zeros(0, np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1]) if len(stops) else stops
    spans = np.stack([starts, stops], axis=1)
    # Only short lines can be blank; long ones are not read again.
    keep = np.ones(len(spans), bool)
    for i in np.flatnonzero(stops - starts < 16):
        file.seek(starts[i])
        keep[i] = bool(file.read(int(stops[i] - starts[i])).strip())
    if len(spans):
        file.seek(0)
        if file.read(3) == b"\xef\xbb\xbf":  # byte order mark
            spans[0, 0] = 3
    return spans[keep]


def list_spans(file: BinaryIO) -> np.ndarray:
    """Where the elements of a JSON list start and end: int64 [records, 2].

    The elements are parsed one after the other and thrown away, from a window of the file. Read
    as Latin-1, a character is a byte, so that positions in the text are offsets in the file.
    """
    decoder = json.JSONDecoder()
    spans: list[tuple[int, int]] = []
    text = file.read(_CHUNK).decode("latin-1")
    base = 0  # offset of text[0]
    at = text.index("[") + 1
    more = True
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at < len(text) and text[at] == "]":
            return np.array(spans, np.int64).reshape(-1, 2)
        try:
            _, end = decoder.raw_decode(text, at)
            if end == len(text) and more:
                raise ValueError("may go on in the next window")  # as a number would
        except ValueError as error:
            chunk = file.read(max(_CHUNK, len(text) - at)) if more else b""
            more = bool(chunk)
            if not more:
                raise ValueError(
                    f"not a JSON list: element {len(spans)} at byte {base + at}: {error}"
                ) from error
            base, text, at = base + at, text[at:] + chunk.decode("latin-1"), 0
            continue
        spans.append((base + at, base + end))
        at = end
