"""Every benchmark in its official layout and in Hugging Face's: items, and scores by hand."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from storm_jax.data import subtitles
from storm_jax.data.video import probe
from storm_jax.evaluation.items import Answered, TaskError
from storm_jax.evaluation.task import without_subtitles
from storm_jax.evaluation.tasks import all_tasks, named
from tests.evaluation import benchmark_files as write

TASKS = all_tasks()

# Task -> writers of its layouts; outputs of a model, one for each item in the order of the files;
# the indices (or None) that are to be read in them; the main metric, in per cent, by hand.
CASES = {
    "videomme": (
        (write.videomme_official, write.videomme_hf),
        ["C", "The best answer is: A. Apples.", "nothing of the kind", "B."],
        [2, 0, None, 1],
        75.0,  # 3 of 4
    ),
    "mvbench": (
        (write.mvbench_official, write.mvbench_hf),
        # Files are read in the order of their names: action_sequence (2), counterfactual_inference,
        # episodic_reasoning, moving_attribute, whose answer is there twice: the last one counts.
        ["A) Ate the medicine.", "A)", "A)", "E", "C) cube"],
        [0, 0, 0, 4, 2],
        87.5,  # mean of 1/2, 1, 1, 1
    ),
    "mlvu_dev": (
        (write.mlvu_dev_official, write.mlvu_dev_hf),
        ["B) Blue", "A", "A", "", "5"],
        [1, 0, 0, None, 2],
        100 * (2 / 3 + 0 + 1) / 3,  # plotQA 2 of 3, needle 0 of 1, count 1 of 1
    ),
    "mlvu_test": (
        (write.mlvu_test_hf,),
        ["F) Vandalism", "E", "(F)"],
        [5, 4, 5],
        75.0,  # anomaly_reco 1 of 1, needleQA 1 of 2
    ),
    "longvideobench_val": (
        (write.longvideobench_official, write.longvideobench_hf),
        ["B. lamp", "B", "E"],
        [1, 1, 4],
        100 * 2 / 3,
    ),
    "egoschema": (
        (write.egoschema_official, write.egoschema_hf),
        ["D", "B", "A"],
        [3, 1, 0],
        50.0,  # of the two whose answers are known
    ),
    "egoschema_subset": (
        (write.egoschema_official, write.egoschema_hf),
        ["D", "B"],
        [3, 1],
        50.0,
    ),
    "lvbench": (
        (write.lvbench_official, write.lvbench_hf),
        ["D", "(A) Cloudy", "A"],
        [3, 0, 0],
        100 * 2 / 3,
    ),
    "tempcompass_multi_choice": (
        (write.tempcompass_official, write.tempcompass_hf),
        ["B", "running", "D. four", "A. one"],
        [1, 1, 3, 0],
        50.0,
    ),
    "tempcompass_yes_no": (
        (write.tempcompass_official, write.tempcompass_hf),
        ["Yes, he is.", "no"],
        [0, 1],
        100.0,
    ),
    "tempcompass_caption_matching": (
        (write.tempcompass_official, write.tempcompass_hf),
        ["Option 1", "A man is dunking.", "Caption B: A woman."],
        [0, 0, 1],
        100 * 2 / 3,
    ),
}
LAYOUTS = [(task, writer) for task, case in CASES.items() for writer in case[0]]


def load(task: str, writer, folder: Path):
    if writer.__name__.endswith("_hf"):
        pytest.importorskip("pyarrow")
    writer(folder)
    return TASKS[task].load(folder)


@pytest.mark.parametrize(
    ("task", "writer"), LAYOUTS, ids=[writer.__name__ + ":" + task for task, writer in LAYOUTS]
)
def test_a_layout_is_read_asked_and_scored(task, writer, tmp_path):
    _, outputs, indices, percent = CASES[task]
    items = load(task, writer, tmp_path)
    assert len(items) == len(outputs) and len({item.id for item in items}) == len(items)
    for item in items:
        assert os.path.exists(item.video), item
        if os.path.isfile(item.video):
            assert probe(item.video).frames == 8
        for family in TASKS[task].families:
            prompt = TASKS[task].prompt(item, family)
            assert prompt.text.startswith("<video>\n") and prompt.text.count("<video>") == 1
            assert item.question in prompt.text
            for option in item.options if task != "tempcompass_yes_no" else ():
                assert option in prompt.text
    family = TASKS[task].families[0]
    found = [TASKS[task].extract(o, i, family) for o, i in zip(outputs, items, strict=True)]
    assert found == indices
    records = [Answered(*r) for r in zip(items, outputs, found, strict=True)]
    score = TASKS[task].score(records)
    assert score.main is not None
    assert 100 * score.main.value == pytest.approx(percent)
    assert score.main.low <= score.main.value <= score.main.high
    assert score.unparsed == sum(
        i is None for i, item in zip(indices, items, strict=True) if item.answer is not None
    )


@pytest.mark.parametrize("task", [task for task, case in CASES.items() if len(case[0]) == 2])
def test_both_copies_hold_the_same_items(task, tmp_path):
    """Apart from where the videos are, and which segment of the file is asked about."""
    sets = [load(task, writer, tmp_path / str(i)) for i, writer in enumerate(CASES[task][0])]
    first, second = (
        [dataclasses.replace(item, video="", subtitles=None, start=None, end=None) for item in s]
        for s in sets
    )
    assert first == second


def test_segments_are_those_of_the_file_that_is_there(tmp_path):
    whole = load("mvbench", write.mvbench_official, tmp_path / "official")
    assert [(i.start, i.end) for i in whole] == [
        (0.25, 0.75),
        (0.0, 0.5),
        (None, None),
        (3.0, 6.0),  # frames, of which three are a second, count as seconds
        (None, None),
    ]
    pytest.importorskip("pyarrow")
    cut = load("mvbench", write.mvbench_hf, tmp_path / "hf")
    assert {(i.start, i.end) for i in cut} == {(None, None)}


def test_groups_of_accuracies(tmp_path):
    items = load("videomme", write.videomme_official, tmp_path)
    records = [Answered(i, o, p) for i, o, p in zip(items, "CAXB", [2, 0, None, 1], strict=True)]
    groups = TASKS["videomme"].score(records).groups
    values = {n: {v: e.value for v, e in group.items()} for n, group in groups.items()}
    assert values["duration"] == {"short": pytest.approx(2 / 3), "long": 1.0}
    assert values["domain"] == {"Knowledge": pytest.approx(2 / 3), "Life Record": 1.0}
    assert values["task_type"] == {
        "Counting Problem": 0.5,
        "Object Reasoning": 1.0,
        "Temporal Reasoning": 1.0,
    }
    assert groups["duration"]["short"].items == 3 and groups["duration"]["short"].videos == 1


def test_a_question_counts_for_each_ability_that_it_tests(tmp_path):
    items = load("lvbench", write.lvbench_official, tmp_path)
    records = [Answered(i, "", p) for i, p in zip(items, [3, 0, 0], strict=True)]
    ability = TASKS["lvbench"].score(records).groups["ability"]
    assert {n: (e.value, e.items) for n, e in ability.items()} == {
        "KIR": (1.0, 1),
        "EU": (0.0, 1),
        "Rea": (0.5, 2),
    }


def test_answers_that_are_hidden_become_files_to_submit(tmp_path):
    task = TASKS["mlvu_test"]
    items = load("mlvu_test", write.mlvu_test_official, tmp_path / "mlvu")
    records = [Answered(i, o, p) for i, o, p in zip(items, "FE?", [5, 4, None], strict=True)]
    score = task.score(records)
    assert score.main is None and (score.items, score.hidden) == (0, 3)
    assert json.loads(task.submission(records)["mlvu_test.json"]) == [
        {"question_id": "AR_0", "question_type": "anomaly_reco", "option": "F"},
        {"question_id": "NQA_3", "question_type": "needleQA", "option": "E"},
        {"question_id": "NQA_4", "question_type": "needleQA", "option": ""},
    ]

    task = TASKS["longvideobench_test"]
    items = load("longvideobench_test", write.longvideobench_official, tmp_path / "lvb")
    records = [Answered(i, o, p) for i, o, p in zip(items, "BAE", [1, 0, 4], strict=True)]
    assert task.score(records).main is None
    assert json.loads(task.submission(records)["longvideobench_test.json"]) == {
        "86CxyhFV9MI_0": "B",
        "86CxyhFV9MI_1": "A",
        "@user-7_0": "E",
    }

    task = TASKS["egoschema"]
    items = load("egoschema", write.egoschema_official, tmp_path / "ego")
    records = [Answered(i, o, p) for i, o, p in zip(items, "D?C", [3, None, 2], strict=True)]
    score = task.score(records)
    assert score.main is not None and (score.main.value, score.items, score.hidden) == (0.5, 2, 1)
    files = task.submission(records)
    expected = {item.id: choice for item, choice in zip(items, [3, -1, 2], strict=True)}
    assert json.loads(files["egoschema_validation_server.json"]) == expected
    assert files["egoschema_kaggle.csv"].splitlines() == [
        "q_uid,answer",
        *(f"{uid},{choice}" for uid, choice in expected.items()),
    ]
    assert not TASKS["videomme"].submission([])


def test_captions_are_written_for_a_judge(tmp_path):
    task = TASKS["tempcompass_captioning"]
    (item,) = load("tempcompass_captioning", write.tempcompass_official, tmp_path)
    output = task.extract(" A man runs fast.\n", item, "official")
    score = task.score([Answered(item, "A man runs fast.", output)])
    assert score.main is None and score.hidden == 1
    assert json.loads(task.submission([Answered(item, output, output)])["captioning.json"]) == {
        "1034419625": {
            "speed": [{"question": item.printed, "prediction": "A man runs fast."}],
        }
    }


def test_an_answer_that_is_no_candidate_is_never_right(tmp_path):
    """As two of MLVU's needle task: an error of the files, and part of the benchmark."""
    row = {
        "video": "needle_1.mp4",
        "question": "What is he doing?",
        "candidates": ["Fishing", "Catching the drone", "Launching the drone", "Sunbathing"],
        "answer": "Catching a flying drone quadcopter",
        "question_type": "findNeedle",
    }
    write.dump(tmp_path / "json" / "2_needle.json", [row])
    (item,) = TASKS["mlvu_dev"].load(tmp_path)
    scores = [TASKS["mlvu_dev"].score([Answered(item, "", p)]).main for p in (0, 1, 2, 3, None)]
    assert [s.value for s in scores if s] == [0, 0, 0, 0, 0]


def test_own_questions(tmp_path):
    write.own(tmp_path)
    task = TASKS["own"]
    items = task.load(tmp_path)
    assert task.load(tmp_path / "own.jsonl") == items
    assert [i.answer for i in items] == [1, 0, "The red ball.", None]
    assert (items[0].start, items[0].end) == (0.25, 0.75)
    assert [os.path.basename(v) for v in without_subtitles(items)] == ["a.mp4", "b.mp4"]
    outputs = ["B. a pen", "z", " a red ball on string!", "It lies there."]
    found = [task.extract(o, i, "official") for o, i in zip(outputs, items, strict=True)]
    assert found == [1, 2, "a red ball on string!", "It lies there."]
    score = task.score([Answered(*r) for r in zip(items, outputs, found, strict=True)])
    assert score.main is not None and score.main.value == pytest.approx(1 / 3)
    assert score.metric == "accuracy; of open-ended questions exact match after normalisation"
    # {red, ball} of {red, ball, on, string}: precision 1/2, recall 1.
    assert score.also["token F1 of open-ended questions"].value == pytest.approx(2 / 3)
    assert (score.items, score.hidden) == (3, 1)
    exact = task.score([Answered(items[2], "Red ball", "Red ball")])
    assert exact.main is not None and exact.main.value == 1.0
    assert exact.metric == "exact match after normalisation"


def test_own_questions_with_several_categories(tmp_path):
    """A list is several values of one category, and no value of its own."""
    rows = [
        {"video": "a.mp4", "question": "?", "options": ["x", "y"], "answer": 0, "categories": c}
        for c in (
            {"skill": ["count", "order", "count"], "scene": "kitchen"},
            {"skill": ["order"], "scene": None, "level": 3},
            {"skill": [], "level": [3, "3", 4.5]},
        )
    ]
    write.dump_lines(tmp_path / "own.jsonl", rows)
    task = TASKS["own"]
    items = task.load(tmp_path)
    assert [item.categories for item in items] == [
        {"skill": ("count", "order"), "scene": "kitchen"},
        {"skill": ("order",), "level": "3"},
        {"level": ("3", "4.5")},
    ]
    score = task.score([Answered(i, "", p) for i, p in zip(items, (0, 1, 1), strict=True)])
    found = {
        name: {value: (e.value, e.items) for value, e in values.items()}
        for name, values in score.groups.items()
    }
    assert found == {
        "skill": {"count": (1.0, 1), "order": (0.5, 2)},
        "scene": {"kitchen": (1.0, 1)},
        "level": {"3": (0.0, 2), "4.5": (0.0, 1)},
    }
    assert score.main is not None and score.main.items == 3
    record = {"id": "r", "media": [{"type": "video", "path": "a.mp4"}], "task": "speed"}
    turns = [{"from": "human", "value": "<video>\n?"}, {"from": "gpt", "value": "x"}]
    write.dump_lines(tmp_path / "own.jsonl", [{**record, "conversations": turns, "group": [4, 8]}])
    assert task.load(tmp_path)[0].categories == {"task": "speed", "group": ("4", "8")}


def test_own_data_set_of_this_project(tmp_path):
    """What `data.synthetic` writes, and the same with options and a group as in data.controlled."""
    from storm_jax.data.synthetic import write_split

    path = Path(write_split(str(tmp_path), "test", 4, 0))
    task = TASKS["own"]
    items = task.load(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for item, row in zip(items, rows, strict=True):
        question = row["conversations"][0]["value"]
        assert task.prompt(item, "official").text == question
        assert item.answer == row["conversations"][1]["value"] and not item.options
        assert item.categories == {"task": row["task"]}
        assert probe(item.video).frames == 8
    with_options = [
        {**rows[0], "options": ["left", "right"], "answer": 1, "group": 4},
        {**rows[0], "id": "x", "options": ["up", rows[0]["conversations"][1]["value"], "down"]},
    ]
    write.dump_lines(tmp_path / "own.jsonl", with_options)
    first, second = task.load(tmp_path)
    assert first.options == ("left", "right") and first.answer == 1
    assert first.categories == {"task": rows[0]["task"], "group": "4"}
    assert second.answer == 1
    assert task.prompt(first, "lmms").text == rows[0]["conversations"][0]["value"]
    assert task.extract("right", first, "official") == 1


def test_subtitles_are_found(tmp_path):
    items = load("videomme", write.videomme_official, tmp_path / "vmme")
    assert [os.path.basename(v) for v in without_subtitles(items)] == ["-abc_DEF123.mp4"]
    assert items[0].subtitles is not None
    assert [c.text for c in subtitles.read(items[0].subtitles)] == [
        "good morning",
        "between two frames",
        "good night",
    ]
    items = load("longvideobench_val", write.longvideobench_official, tmp_path / "lvb")
    assert not without_subtitles(items) and [i.subtitle_offset for i in items] == [0, 0, 100]


def test_counts_of_a_full_set_and_of_a_part(tmp_path):
    task = TASKS["longvideobench_val"]
    items = load("longvideobench_val", write.longvideobench_official, tmp_path)
    assert task.difference(items) == (
        "expected 1337 items, found 3; expected 753 videos, found 2; of duration_group expected and"
        " found: 15 189 and 1, 3600 564 and 0, 60 172 and 0, 600 412 and 2"
    )
    full = []
    for group, count in (("15", 189), ("60", 172), ("600", 412), ("3600", 564)):
        for _ in range(count):
            n = len(full)
            changed = {
                "id": str(n),
                "video": str(n % 753),
                "options": tuple("abcde"[: 2 + n % 4]),
                "categories": {"duration_group": group},
            }
            full.append(dataclasses.replace(items[0], **changed))
    assert task.difference(full) == ""
    assert task.difference([*full[:-1], dataclasses.replace(full[-1], options=())]) == (
        "expected 2 to 5 options, found 0 to 5"
    )
    assert TASKS["own"].difference(items) == ""


@pytest.mark.parametrize(
    ("task", "items", "options"),
    [
        ("videomme", 2700, (4, 4)),
        ("mvbench", 4000, (1, 5)),
        ("mlvu_dev", 2175, (4, 4)),
        ("mlvu_test", 502, (6, 6)),
        ("longvideobench_val", 1337, (2, 5)),
        ("longvideobench_test", 5341, (2, 5)),
        ("egoschema", 5031, (5, 5)),
        ("egoschema_subset", 500, (5, 5)),
        ("lvbench", 1549, (4, 4)),
        ("tempcompass_multi_choice", 1580, (2, 4)),
        ("tempcompass_yes_no", 2453, (2, 2)),
        ("tempcompass_caption_matching", 1503, (2, 2)),
        ("tempcompass_captioning", 2004, (0, 0)),
    ],
)
def test_published_counts(task, items, options):
    expected = TASKS[task].expected
    assert expected is not None and (expected.items, expected.options) == (items, options)
    for values in expected.categories.values():
        assert sum(values.values()) == items


def test_the_folder_may_be_the_one_above_or_below(tmp_path):
    write.videomme_official(tmp_path / "benchmarks" / "Video-MME")
    items = TASKS["videomme"].load(tmp_path / "benchmarks")
    assert items == TASKS["videomme"].load(tmp_path / "benchmarks" / "Video-MME")
    assert items == TASKS["videomme"].load(tmp_path / "benchmarks" / "Video-MME" / "Video-MME.json")
    write.longvideobench_official(tmp_path / "benchmarks" / "longvideobench")
    assert len(TASKS["longvideobench_test"].load(tmp_path / "benchmarks")) == 3


def test_tasks_by_name():
    assert [t.name for t in named("mlvu_dev, videomme,mlvu_dev")] == ["mlvu_dev", "videomme"]
    with pytest.raises(TaskError, match=r"no task 'vidomme'; there are egoschema, .*videomme"):
        named("vidomme")
