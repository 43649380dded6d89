"""Benchmark files that cannot be used: what is said about each."""

import json
import re
import shutil
import sys

import pytest

from storm_jax.evaluation.items import TaskError
from storm_jax.evaluation.tasks import all_tasks
from tests.evaluation import benchmark_files as write

TASKS = all_tasks()


def refused(task, folder, message):
    with pytest.raises(TaskError, match=message) as caught:
        TASKS[task].load(folder)
    return str(caught.value)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------- files


def test_no_folder_and_no_annotations(tmp_path):
    refused("videomme", tmp_path / "none", "none: no such folder or file; give the folder that")
    refused("videomme", tmp_path, r"holds no annotations of Video-MME: expected .*found nothing")
    write.egoschema_official(tmp_path)
    found = "found good_clips_git/, questions.json, subset_answers.json"
    refused("lvbench", tmp_path, f"expected video_info.meta.jsonl, or .* in it or.*{found}")


@pytest.mark.parametrize(
    ("task", "other", "message"),
    [
        ("videomme", "json/1_plotQA.json", "item 0 is not one of Video-MME: expected the fields"),
        ("lvbench", "json/1_plotQA.json", "not one of LVBench: expected the fields uid, question"),
        ("mvbench", "json/1_plotQA.json", "is not called like one of MVBench's 20 tasks"),
        ("mlvu_test", "json/1_plotQA.json", "not one of MLVU's test set: .*question_id"),
        ("egoschema", "json/1_plotQA.json", "expected the fields q_uid, question, option 0"),
        ("longvideobench_val", "json/1_plotQA.json", "expected the fields video_id, .*candidates"),
        ("tempcompass_yes_no", "json/1_plotQA.json", "expected the fields video_id, dim"),
    ],
)
def test_the_file_of_another_benchmark(task, other, message, tmp_path):
    write.mlvu_dev_official(tmp_path)
    text = refused(task, tmp_path / "MLVU" / other, message)
    if "fields" in message:
        assert "found video, duration, question, candidates, answer, question_type" in text
        assert "Is it the file of another benchmark or version?" in text


def test_the_file_of_another_split(tmp_path):
    write.longvideobench_official(tmp_path)
    message = "has no correct_choice; is lvb_test_wo_gt.json a file of the test set"
    refused("longvideobench_val", tmp_path / "lvb_test_wo_gt.json", message)
    write.tempcompass_official(tmp_path)
    path = tmp_path / "questions" / "yes_no.json"
    refused("tempcompass_multi_choice", path, "1034419625/action/0 has the question .*other kind")
    path = tmp_path / "questions" / "multi-choice.json"
    refused("tempcompass_yes_no", path, "the answer 'B. dribbling', which is no text of its 2")


def test_another_version_is_read_and_told(tmp_path):
    """As the clean copy of LVBench, which has 1519 questions: a partial set is allowed."""
    write.lvbench_official(tmp_path)
    items = TASKS["lvbench"].load(tmp_path)
    assert TASKS["lvbench"].difference(items) == (
        "expected 1549 items, found 3; expected 103 videos, found 2"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"q_uid": 1},\n {"q_uid"', r"questions.json:2: is not JSON: Expecting ':' delimiter"),
        ("", "questions.json:1: is not JSON: .*; the file is empty, so copy it again"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5",
            "it is a pointer of Git LFS, so run git lfs pull",
        ),
        ("[]", "questions.json: holds no items; expected those of EgoSchema"),
        ("[1, 2]", "expected a list of objects, as EgoSchema has; found a list with 1"),
        ('{"a": 1}', "expected a list of objects, as EgoSchema has; found a dict"),
    ],
)
def test_files_that_are_not_what_they_should_be(text, message, tmp_path):
    (tmp_path / "questions.json").write_text(text)
    refused("egoschema", tmp_path, message)


def test_other_encoding(tmp_path):
    (tmp_path / "questions.json").write_bytes('[{"a": "é"}]'.encode("latin-1"))
    refused("egoschema", tmp_path, "questions.json: cannot be read: 'utf-8' codec")


def test_a_line_of_jsonl(tmp_path):
    write.lvbench_official(tmp_path)
    path = tmp_path / "data" / "video_info.meta.jsonl"
    path.write_text(path.read_text() + "\n{broken\n")
    refused("lvbench", tmp_path, r"video_info.meta.jsonl:4: is not JSON")


def test_parquet_that_is_cut_off(tmp_path):
    pytest.importorskip("pyarrow")
    write.videomme_hf(tmp_path)
    path = tmp_path / "videomme" / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    refused("videomme", tmp_path, "00001.parquet: not a complete parquet file")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "videomme" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused("videomme", tmp_path, r"parquet files need pyarrow; pip install 'storm_jax\[parquet\]'")


# ------------------------------------------------------------------------------------------- items


def videomme_row(tmp_path, **change):
    write.videomme_official(tmp_path)
    edit(tmp_path / "Video-MME.json", lambda videos: videos[0]["questions"][0].update(change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": None}, r"item 001-1 has no options \(None\); add them"),
        ({"options": []}, r"item 001-1 has no options \(\[\]\)"),
        ({"options": ["A. x"]}, r"item 001-1 has 1 option \(\['A. x'\]\), expected 2 to 26"),
        ({"options": ["A. x", 3, None, "D. y"]}, "has the option None; options are texts"),
        (
            {"options": ["A. x", "B. y", "C. y", "D. z"], "answer": "C"},
            "has its right answer 'y' twice among its options .*correct the item, or leave it out",
        ),
        ({"options": ["A. x", "C. y"]}, "has the option 'C. y' where 'B' and its text were"),
        ({"options": ["x", "y"]}, "has the option 'x' where 'A' and its text were expected"),
        ({"answer": "E"}, r"has the answer 'E', which is no letter of its 4 options"),
        ({"answer": None}, "has the answer None, which is no letter of its 4 options"),
        ({"question": " "}, "item 0 has question=' '; it must be a text"),
        ({"question_id": "001-2"}, "two items have the id '001-2'; is a file there twice?"),
    ],
)
def test_options_and_answers(change, message, tmp_path):
    videomme_row(tmp_path, **change)
    text = refused("videomme", tmp_path, message)
    assert str(tmp_path) in text


def test_wrong_options_may_be_the_same(tmp_path):
    videomme_row(tmp_path, options=["A. x", "B. x", "C. y"])
    assert TASKS["videomme"].load(tmp_path)[0].options == ("x", "x", "y")


def test_number_of_options(tmp_path):
    write.mlvu_dev_official(tmp_path / "dev")
    path = tmp_path / "dev" / "MLVU" / "json" / "4_count.json"
    edit(path, lambda rows: rows[0].update(candidates=["5", "1", "2"]))
    refused("mlvu_dev", tmp_path / "dev", r"has 3 options .*, expected 4; is the file complete")
    write.mlvu_test_official(tmp_path / "test")
    path = tmp_path / "test" / "MLVU_Test" / "leaderboard" / "test_question.json"
    edit(path, lambda rows: rows[0].update(candidates=list("abcd")))
    refused("mlvu_test", tmp_path / "test", r"item AR_0 has 4 options .*, expected 6")


def test_answers_that_are_no_options(tmp_path):
    write.mlvu_dev_official(tmp_path / "mlvu")
    path = tmp_path / "mlvu" / "MLVU" / "json" / "4_count.json"
    edit(path, lambda rows: rows[0].update(answer="9"))
    refused("mlvu_dev", tmp_path / "mlvu", "item 0 has the answer '9', which is no letter of its 4")
    write.longvideobench_official(tmp_path / "lvb")
    edit(tmp_path / "lvb" / "lvb_val.json", lambda rows: rows[0].update(correct_choice=4))
    refused("longvideobench_val", tmp_path / "lvb", "has the answer 4, which is no index of its 4")
    write.egoschema_official(tmp_path / "ego")
    edit(tmp_path / "ego" / "subset_answers.json", lambda a: a.update({next(iter(a)): 5}))
    refused("egoschema", tmp_path / "ego", "has the answer 5, which is no index of its 5 options")
    write.mvbench_official(tmp_path / "mvb")
    path = tmp_path / "mvb" / "json" / "action_sequence.json"
    edit(path, lambda rows: rows[0].update(answer="Ate it."))
    refused("mvbench", tmp_path / "mvb", "action_sequence.json: item 0 has the answer 'Ate it.'")


def test_other_fields(tmp_path):
    write.mvbench_official(tmp_path / "mvb")
    path = tmp_path / "mvb" / "json" / "action_sequence.json"
    edit(path, lambda rows: rows[1].update(start="soon"))
    refused("mvbench", tmp_path / "mvb", "item 1 has start='soon'; it must be seconds")
    write.mlvu_dev_official(tmp_path / "mlvu")
    path = tmp_path / "mlvu" / "MLVU" / "json" / "4_count.json"
    edit(path, lambda rows: rows[0].update(question_type="sportsQA"))
    refused("mlvu_dev", tmp_path / "mlvu", "of the task 'sportsQA'; MLVU's dev set has plotQA,")
    write.tempcompass_official(tmp_path / "tc")
    path = tmp_path / "tc" / "questions" / "yes_no.json"
    edit(path, lambda videos: videos["1034419625"].update(colour=videos["1034419625"]["action"]))
    refused("tempcompass_yes_no", tmp_path / "tc", "is about 'colour'; TempCompass has action,")
    write.dump(path, {"x": []})
    refused("tempcompass_yes_no", tmp_path / "tc", "expected video -> dimension .*'x' -> a list")
    write.lvbench_official(tmp_path / "lv")
    path = tmp_path / "lv" / "data" / "video_info.meta.jsonl"
    path.write_text(path.read_text().replace("\\n(A) He\\n(B) She\\n(C) They\\n(D) Nobody", ""))
    refused("lvbench", tmp_path / "lv", r"item 1 has no options in its question 'Who wins\?'")


def test_a_subset_without_answers(tmp_path):
    write.egoschema_official(tmp_path)
    (tmp_path / "subset_answers.json").unlink()
    message = "no item has a published answer; put subset_answers.json beside questions.json"
    refused("egoschema_subset", tmp_path, message)
    assert {item.answer for item in TASKS["egoschema"].load(tmp_path)} == {None}
    (tmp_path / "subset_answers.json").write_text("[1]")
    refused("egoschema_subset", tmp_path, "expected an object of q_uid and answer, 0 to 4")


def test_missing_videos_have_the_path_where_they_should_be(tmp_path):
    """All are listed by whoever runs the evaluation; reading the annotations does not fail."""
    write.videomme_official(tmp_path)
    shutil.rmtree(tmp_path / "data")
    items = TASKS["videomme"].load(tmp_path)
    assert items[0].video == str(tmp_path / "data" / "fFjv93ACGo8.mp4")
    (tmp_path / "data").mkdir()  # the same, where the annotations lie in a folder of their own
    dump = tmp_path / "videomme" / "Video-MME.json"
    dump.parent.mkdir()
    shutil.move(tmp_path / "Video-MME.json", dump)
    assert TASKS["videomme"].load(tmp_path)[0].video == items[0].video
    write.mlvu_dev_official(tmp_path)
    shutil.rmtree(tmp_path / "MLVU" / "video" / "4_count")
    item = TASKS["mlvu_dev"].load(tmp_path)[-1]
    assert item.video == str(tmp_path / "MLVU" / "video" / "4_count" / "count_126.mp4")


# ------------------------------------------------------------------------------------ own questions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": None}, "item 0 has video=None; it must be a text"),
        ({"question": 5.5, "video": ""}, "item 0 has video=''; it must be a text"),
        ({"options": "a, b"}, r"item a has no options \('a, b'\)"),
        ({"options": ["a cup"]}, r"item a has 1 option \(\['a cup'\]\), expected 2 to 26"),
        ({"options": ["a pen", "a pen"]}, "item a has 'a pen' twice among its options"),
        ({"options": ["a pen", " "]}, "item a has an empty option among its options"),
        ({"answer": "a hat"}, "item a has the answer 'a hat', which is no text of its 2 options"),
        ({"answer": 2}, "item a has the answer 2, which is no index of its 2 options"),
        ({"answer": True}, "item a has the answer True, which is no index of its 2 options"),
        ({"options": None, "answer": 3}, "item a has the answer 3; without options it must be"),
        ({"subtitles": "b.srt"}, "item a has subtitles='b.srt': there is no such file"),
        ({"start": "1"}, "item a has start='1'; it must be seconds"),
        ({"categories": ["x"]}, r"item a has categories=\['x'\]; expected an object"),
        ({"id": "b"}, "two items have the id 'b'"),
        (
            {"categories": {"scene": [["x"]]}},
            r"item a has the category scene=\[\['x'\]\]; write a text or a number, or a list",
        ),
        ({"categories": {"scene": {"x": 1}}}, r"item a has the category scene=\{'x': 1\}; write"),
        ({"conversations": []}, "own.jsonl: record 0 .id a.: "),
    ],
)
def test_own_items(change, message, tmp_path):
    write.own(tmp_path)
    path = tmp_path / "own.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0].update(change)
    write.dump_lines(path, rows)
    refused("own", tmp_path, message)


def test_own_item_without_a_field(tmp_path):
    write.dump_lines(tmp_path / "q.jsonl", [{"clip": "a.mp4", "question": "?"}])
    refused("own", tmp_path, "expected the fields video, question; found clip, question")


def test_own_record_about_two_videos(tmp_path):
    record = {
        "id": "two",
        "media": [{"type": "video", "path": "a.mp4"}, {"type": "video", "path": "b.mp4"}],
        "conversations": [
            {"from": "human", "value": "<video><video>\nWhich?"},
            {"from": "gpt", "value": "The first."},
        ],
    }
    write.dump_lines(tmp_path / "q.jsonl", [record])
    refused("own", tmp_path, "item two has 2 media; a question is about one video")


def test_which_of_several_files_is_the_users(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write.dump_lines(tmp_path / name, [{"video": "a.mp4", "question": "?"}])
    refused("own", tmp_path, re.escape("holds a.jsonl, b.jsonl: give the file itself, or call it"))
    assert len(TASKS["own"].load(tmp_path / "a.jsonl")) == 1
