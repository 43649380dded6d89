"""Tars and parquet files that others made: where their media and their turns stand."""

import json

import pytest

from storm_jax.config import SourceConfig
from storm_jax.data.open_records import open_records
from tests.data.record_files import record, write_tar


def test_samples_of_webdatasets(tmp_path):
    """Media by name, by the last part of it, by their sample alone; members in any order."""

    def said(question, **more):
        turns = record("", [], question)["conversations"]
        return json.dumps({"conversations": turns, **more})

    path = write_tar(
        tmp_path / "w.tar",
        {
            "d/0.mp4": b"zero",
            "d/1.jpg": b"one",
            "d/0.json": said("<image>?"),
            "d/1.json": said("<image>?", image="photos/1.jpg", id="one"),
            "d/2.json": said("<image>?", video="d/0.mp4"),
            "d/3.json": said("<image> <video>?"),
            "d/3.a.jpg": b"three",
            "d/3.b.webm": b"four",
            "d/4.json": said("<video>?", video="elsewhere/z.avi"),
            "d/5.json": said("<video>?", video="source/name.mp4"),
            "d/5.mp4": b"five",
            "d/._5.mp4": b"what macOS adds",
            "README": b"no sample",
        },
    )
    (part,) = open_records(SourceConfig(str(path), "/data"))
    found = []
    for number in range(len(part.records)):
        its = part.records[number]
        media = [part.records.opened(m) for m in its.media]
        shown = [(m.kind, m.data.read() if m.data else m.path) for m in media]
        found.append((its.id, shown))
    assert found == [
        ("d/0", [("video", b"zero")]),
        ("one", [("image", b"one")]),
        ("d/2", [("video", b"zero")]),
        ("d/3", [("image", b"three"), ("video", b"four")]),
        ("d/4", [("video", "/data/elsewhere/z.avi")]),
        ("d/5", [("video", b"five")]),
    ]


def test_chat_messages_in_parquet(tmp_path):
    """Contents deep inside a column, a column of bytes alone, and a list of them."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def chat(data, path):
        parts = [
            {"type": "image", "text": None, "image": {"bytes": data, "path": path}},
            {"type": "text", "text": "What?", "image": None},
        ]
        answer = [{"type": "text", "text": "A cat.", "image": None}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]

    def opened(table):
        path = str(tmp_path / "x.parquet")
        parquet.write_table(table, path)
        (part,) = open_records(SourceConfig(path, "/data"))
        media = [[part.records.opened(m) for m in part.records[i].media] for i in range(2)]
        return [[m.data or m.path for m in its] for its in media]

    table = pyarrow.table({"messages": [chat(b"one", "1.jpg"), chat(None, "2.jpg")]})
    assert opened(table) == [[b"one"], ["/data/2.jpg"]]
    turns = record("", [], "<video> <image> <image>?")["conversations"]
    told = [turns, record("", [], "<image>?")["conversations"]]
    table = pyarrow.table(
        {"conversations": told, "video": [b"v", None], "images": [[b"a", b"b"], [b"c"]]}
    )
    assert opened(table) == [[b"v", b"a", b"b"], [b"c"]]
