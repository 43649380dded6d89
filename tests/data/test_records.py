import json
import pickle

import pytest

from storm_jax.data import spans
from storm_jax.data.formats.json_file import JsonFile
from storm_jax.data.records import Media, RecordError, Turn, parse_record

QA = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
VIDEO = (Media("video", "/media/b.mp4"),)
IMAGE = (Media("image", "/media/c.jpg"),)


def parse(**raw):
    return parse_record(raw, 7, "sets/mix.json", "/media")


def ask(question, *more):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}, *more]


def test_own_schema():
    record = parse(
        id="a1",
        task="direction",
        media=[
            {"type": "video", "path": "v/x.mp4", "start": 1, "end": 2.5},
            {"type": "image", "path": "i.png"},
        ],
        conversations=ask("Compare <video> with <image>."),
    )
    assert record.id == "a1" and record.task == "direction" and record.source == "mix"
    assert record.media == (
        Media("video", "/media/v/x.mp4", 1.0, 2.5),
        Media("image", "/media/i.png"),
    )
    assert record.turns == (
        Turn("user", "Compare <video> with <image>."),
        Turn("assistant", "Yes."),
    )


@pytest.mark.parametrize(
    "raw, media, question",
    [
        # LLaVA-Video-178K: <image> stands for the video
        (
            {"id": 3, "data_source": "s", "video": "b.mp4", "conversations": ask("<image>\nQ")},
            VIDEO,
            "<video>\nQ",
        ),
        # ShareGPT4Video's question mix, VILA's list
        ({"video": ["b.mp4"], "conversations": ask("<video>\nQ")}, VIDEO, "<video>\nQ"),
        ({"video": "b.mp4", "conversations": ask("<vila/video>Q")}, VIDEO, "<video>Q"),
        # LLaVA-OneVision and interleaved sets, Idefics2's "images"
        ({"image": "c.jpg", "conversations": ask("Q <image>")}, IMAGE, "Q <image>"),
        (
            {"images": ["c.jpg", "d.jpg"], "conversations": ask("<image> or <image>?")},
            (Media("image", "/media/c.jpg"), Media("image", "/media/d.jpg")),
            "<image> or <image>?",
        ),
        # images and videos together: placeholders say in which order
        (
            {"image": "c.jpg", "video": "b.mp4", "conversations": ask("<video> then <image>")},
            (Media("video", "/media/b.mp4"), Media("image", "/media/c.jpg")),
            "<video> then <image>",
        ),
        # MVBench-like clips, a folder of frames, absolute paths, text only
        (
            {"video": "b.mp4", "start": 2, "end": 4, "conversations": ask("<video>Q")},
            (Media("video", "/media/b.mp4", 2.0, 4.0),),
            "<video>Q",
        ),
        (
            {"video": "/abs/frames", "conversations": ask("<video>Q")},
            (Media("video", "/abs/frames"),),
            "<video>Q",
        ),
        ({"image": None, "video": [], "conversations": ask("Q")}, (), "Q"),
    ],
)
def test_llava_family(raw, media, question):
    record = parse(**raw)
    assert record.media == media
    assert record.turns == (Turn("user", question), Turn("assistant", "Yes."))
    assert record.id == str(raw.get("id", 7))
    assert record.source == raw.get("data_source", "mix")


def test_chat_messages_with_parts():
    record = parse(
        messages=[
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": "x.mp4"},
                    {"type": "text", "text": "What is it?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ]
    )
    assert record.media == (Media("video", "/media/x.mp4"),)
    assert record.turns == (
        Turn("system", "Be brief."),
        Turn("user", "<video>What is it?"),
        Turn("assistant", "A cat."),
    )


def test_parts_without_paths_take_the_records_media():
    parts = [{"type": "image"}, {"type": "text", "text": " Q"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]
    record = parse(images=["c.jpg"], messages=messages)
    assert record.media == IMAGE
    assert record.turns[0] == Turn("user", "<image> Q")


def test_sharegpt4video_captions():
    captions = [{"idx": "1", "content": "part"}, {"idx": "-1", "content": "the whole"}]
    record = parse(video_id="v", video_path="panda/x.mp4", captions=captions)
    assert record.media == (Media("video", "/media/panda/x.mp4"),)
    assert record.turns[0].text.startswith("<video>\n")
    assert record.turns[1] == Turn("assistant", "the whole")


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"video": "b.mp4", "conversations": ask("Q")}, "no <video> placeholder for b.mp4"),
        ({"images": ["c", "d"], "conversations": ask("<image>Q")}, "2 media and 1 placeholders"),
        ({"video": "b.mp4", "conversations": ask("<video> <video>")}, "2 placeholders but 1 media"),
        ({"conversations": ask("<image>Q")}, "1 placeholders but 0 media"),
        ({"conversations": QA[::-1]}, "the first turn is the assistant's"),
        ({"conversations": [{"from": "system", "value": "s"}]}, "the first turn is the system's"),
        ({"conversations": [{"from": "human", "value": "Q"}]}, "the last question has no answer"),
        (
            {"conversations": ask("Q", {"from": "human", "value": "And?"})},
            "the last question has no answer",
        ),
        ({"conversations": [QA[0], {"from": "gpt", "value": " "}]}, "answer in turn 1 is empty"),
        ({"conversations": [QA[0], QA[0], QA[1]]}, "user and assistant must alternate"),
        ({"conversations": []}, "has no conversation"),
        ({"id": 1}, "has no conversation"),
        (
            {"conversations": ask("Q")[:1] + [{"from": "gpt", "value": "<image>"}]},
            "assistant's text",
        ),
        ({"conversations": [{"from": "bing", "value": "Q"}]}, "turn 0 is from 'bing'"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 0 has no text"),
        ({"conversations": ["Q"]}, "not an object"),
        ({"video": {"x": 1}, "conversations": QA}, "must be a path or a list of paths"),
        ({"media": "x.mp4", "conversations": QA}, "must be a list of objects"),
        ({"media": [{"path": "x.mp4"}], "conversations": QA}, '"type"'),
        ({"media": [{"type": "video"}], "conversations": QA}, '"path"'),
        (
            {"media": [{"type": "video", "path": "x", "start": 5, "end": 4}], "conversations": QA},
            "no span of time",
        ),
        (
            {"media": [{"type": "video", "path": "x", "start": "5"}], "conversations": QA},
            "number of seconds",
        ),
        ({"captions": [{"idx": "0", "content": "x"}], "video_path": "x"}, "whole video's caption"),
    ],
)
def test_bad_records_say_what_is_wrong(raw, message):
    with pytest.raises(RecordError, match="^sets/mix.json: record 7 .id ") as error:
        parse(**raw)
    assert message in str(error.value)


RECORDS = [
    {"id": f"r{i}", "video": f"{i}.mp4", "conversations": ask(f'<video> "{{ü]"\\ {"x" * (17 * i)}')}
    for i in range(12)
]


@pytest.mark.parametrize("chunk", [16, 61, 1 << 20])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl without last newline", "list", "indented", "bom"])
def test_random_access(tmp_path, monkeypatch, chunk, kind):
    monkeypatch.setattr(spans, "_CHUNK", chunk)
    path = tmp_path / "data.json"
    lines = [json.dumps(r, ensure_ascii=i % 2 == 0) for i, r in enumerate(RECORDS)]
    text = {
        "jsonl": "\n".join(lines) + "\n",
        "jsonl without last newline": "\n\n".join(lines[:6]) + "\n  \n" + "\r\n".join(lines[6:]),
        "list": "[" + ",".join(lines) + "]",
        "indented": json.dumps(RECORDS, indent=2, ensure_ascii=False),
        "bom": "\ufeff" + "\n".join(lines),
    }[kind]
    path.write_bytes(text.encode())
    records = JsonFile(str(path))
    assert len(records) == 12
    for i in (11, 0, 5):
        assert records[i].id == f"r{i}"
        assert records[i].media[0].path == str(tmp_path / f"{i}.mp4")
        assert records[i].turns[0].text == f'<video> "{{ü]"\\ {"x" * (17 * i)}'
    again = pickle.loads(pickle.dumps(records))
    assert again[3] == records[3]
    with pytest.raises(IndexError):
        records[12]


def test_a_worker_gets_no_records(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps(RECORDS[11])] * 500))
    assert len(pickle.dumps(JsonFile(str(path)))) < 500 * 16 + 1000


def test_a_bad_line_is_an_error_of_its_own(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n{broken\n[1]\n" + json.dumps(RECORDS[1]) + "\n")
    records = JsonFile(str(path), media_root="/root")
    assert records[0].media[0].path == "/root/0.mp4"
    assert records[3].id == "r1"
    with pytest.raises(RecordError, match=r"data.jsonl: record 1 is not JSON"):
        records[1]
    with pytest.raises(RecordError, match=r"record 2 is a list"):
        records[2]


def test_files_that_cannot_be_indexed(tmp_path):
    with pytest.raises(RecordError, match="No such file"):
        JsonFile(str(tmp_path / "none.jsonl"))
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(RECORDS)[:-40])
    with pytest.raises(RecordError, match=r"cut.json: not a JSON list: element 11 at byte \d+"):
        JsonFile(str(path))
    path.write_text("")
    assert len(JsonFile(str(path))) == 0
    path.write_text("[]")
    assert len(JsonFile(str(path))) == 0
