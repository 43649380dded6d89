"""Subtitle files of the forms that are met, and what is said about those that are broken."""

import json
import math

import pytest

from storm_jax.data.subtitles import Cue, SubtitleError, read, within

SRT = """1
00:00:01,000 --> 00:00:02,500
Hello <i>there</i>,
{\\an8}you &amp; me

2
00:00:04,000 --> 00:00:05,000 X1:40 X2:600
second

3
01:00:00,000 --> 01:00:01,000

"""
VTT = """WEBVTT - a title
Kind: captions

NOTE a remark
over two lines

STYLE
::cue { color: red }

intro
00:01.000 --> 00:02.500 align:start position:0%
<v Roger>Hello <00:01.500>there,
you &amp; me

00:04.000 --> 00:05.000
second
"""
CUES = [Cue(1.0, 2.5, "Hello there, you & me"), Cue(4.0, 5.0, "second")]


@pytest.fixture
def file(tmp_path):
    def write(name, content, encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes(content.encode(encoding))
        return str(path)

    return write


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name, content", [("a.srt", SRT), ("a.vtt", VTT), ("A.SRT", SRT)])
def test_text_forms(file, name, content, newline):
    path = file(name, content.replace("\n", newline), "utf-8-sig" if ".srt" in name else "utf-8")
    assert read(path) == CUES


@pytest.mark.parametrize(
    "entries",
    [
        [{"start": 4, "end": 5.0, "text": "second"}, {"start": 1.0, "end": 2.5, "text": "A"}],
        [
            {"start": "00:00:01.000", "end": "00:00:02.500", "line": "A"},  # LongVideoBench
            {"start": "00:00:04.000", "end": "00:00:05.000", "line": "second"},
        ],
        [{"timestamp": [1.0, 2.5], "text": "A"}, {"timestamp": [4, 5], "text": "second"}],
        {"language": "en", "segments": [  # Whisper
            {"id": 0, "start": 1.0, "end": 2.5, "text": " A"},
            {"id": 1, "start": 4.0, "end": 5.0, "text": " second"},
        ]},
    ],
)  # fmt: skip
def test_json_forms(file, entries):
    assert read(file("a.json", json.dumps(entries))) == [Cue(1, 2.5, "A"), Cue(4, 5, "second")]


@pytest.mark.parametrize("times", [{"timestamp": [4.0, None]}, {"start": 4.0, "end": None}])
def test_an_end_that_is_left_open(file, times):
    (cue,) = read(file("a.json", json.dumps([{**times, "text": "last"}])))
    assert cue == Cue(4.0, math.inf, "last")
    assert within([cue], 1e9, None) == [cue] and within([cue], None, 3.0) == []


def test_no_text_becomes_a_placeholder(file):
    """Neither spelled out, nor hidden in entities, nor left when another tag is taken away."""
    texts = ["a <video> b", "&lt;video&gt;", "<vi<b>deo>", "&amp;lt;image&amp;gt;", "<<i>image>"]
    entries = [{"start": 0, "end": 1, "text": text} for text in texts]
    joined = "".join(cue.text for cue in read(file("a.json", json.dumps(entries))))
    assert "<video>" not in joined and "<image>" not in joined
    assert read(file("b.srt", "1\n00:00:01,0 --> 00:00:02,0\n3 < 4 and 5 > 2 <3\n")) == [
        Cue(1.0, 2.0, "3 < 4 and 5 > 2 <3")
    ]


def test_within_the_clip():
    cues = [Cue(0, 1, "a"), Cue(2, 3, "b"), Cue(4, 6, "c"), Cue(7, 8, "d")]
    assert within(cues, None, None) == cues
    assert [c.text for c in within(cues, 1.0, 4.5)] == ["b", "c"]
    assert [c.text for c in within(cues, 5.0, None)] == ["c", "d"]
    assert [c.text for c in within(cues, None, 2.0)] == ["a"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.srt", "1\nno times\n", r"a\.srt:1: expected a subtitle's number and its times"),
        ("a.srt", SRT.replace("00:00:04,000", "00:00:4x"), r"a\.srt:7: '00:00:4x' is not a time"),
        ("a.srt", SRT.replace("00:00:05,000", ""), r"a\.srt:7: 'X1:40' is not a time"),
        ("a.srt", "1\n00:00:02,0 --> 00:00:01,0\nx\n", r"a\.srt:2: ends at 1 s, before it starts"),
        ("a.vtt", SRT, r"a\.vtt:1: a \.vtt file begins with WEBVTT"),
        ("a.json", '[{"start": 1},\n oops]', r"a\.json:2: is not JSON"),
        ("a.json", '{"a": 1}', r"a\.json:1: expected a list of subtitles"),
        ("a.json", '[{"start": 1, "end": 2}]', r"a\.json: entry 0: expected \"start\""),
        ("a.json", "[3]", r"a\.json: entry 0: expected an object"),
        ("a.json", '[{"start": NaN, "end": 2, "text": "x"}]', "entry 0: nan is not a time"),
        ("a.ass", "[Script Info]", r"kind '\.ass' are not known; give \.srt"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_line(file, name, content, message):
    with pytest.raises(SubtitleError, match=message):
        read(file(name, content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SubtitleError, match=r"none\.srt: cannot be read: No such file"):
        read(str(tmp_path / "none.srt"))
    (tmp_path / "latin.srt").write_bytes("1\n00:00:01,0 --> 00:00:02,0\ncafé\n".encode("latin-1"))
    with pytest.raises(SubtitleError, match=r"latin\.srt:3: is not UTF-8; convert it"):
        read(str(tmp_path / "latin.srt"))
