"""Small copies of benchmarks in the layouts they are published in, with real videos.

Each function writes one layout below a folder. Questions, options and answers are the same in the
official layout and in Hugging Face's, so that both must be read alike.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storm_jax.data.synthetic import write_video


def video(path: Path, frames: int = 8) -> None:
    """A real mp4 of 32 x 32 pixels, 8 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.linspace(0, 255, frames).astype(np.uint8)
    write_video(str(path), np.broadcast_to(grey[:, None, None, None], (frames, 32, 32, 3)))


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def dump_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def dump_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


# --------------------------------------------------------------------------------------- Video-MME

SRT = """1
00:00:00,000 --> 00:00:00,300
<font color="white" size=".72c">good morning</font>

2
00:00:00,310 --> 00:00:00,320
<font color="white" size=".72c">between two frames</font>

3
00:00:00,500 --> 00:00:09,000
<font color="white" size=".72c">good night</font>
"""


def videomme_rows() -> list[dict[str, Any]]:
    """Two videos, the first short with three questions, the second long with one."""
    short = {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
        "videoID": "fFjv93ACGo8",
    }
    long = {
        "video_id": "601",
        "duration": "long",
        "domain": "Life Record",
        "sub_category": "Food",
        "url": "https://www.youtube.com/watch?v=-abc_DEF123",
        "videoID": "-abc_DEF123",
    }
    options = ["A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are equal."]
    return [
        {
            **about,
            "question_id": f"{about['video_id']}-{number}",
            "task_type": kind,
            "question": question,
            "options": options,
            "answer": answer,
        }
        for about, number, kind, question, answer in (
            (short, 1, "Counting Problem", "Which are most?", "C"),
            (short, 2, "Object Reasoning", "Which are fewest?", "A"),
            (short, 3, "Counting Problem", "Which are eaten?", "D"),
            (long, 1, "Temporal Reasoning", "Which come first?", "B"),
        )
    ]


def videomme_media(root: Path) -> None:
    video(root / "data" / "fFjv93ACGo8.mp4")
    video(root / "data" / "-abc_DEF123.mp4")
    (root / "subtitle").mkdir()
    (root / "subtitle" / "fFjv93ACGo8.srt").write_text(SRT)


def videomme_official(root: Path) -> None:
    """The form of output_test_template.json: videos with their questions, and no videoID."""
    videos: dict[str, dict[str, Any]] = {}
    for row in videomme_rows():
        about = {n: row[n] for n in ("video_id", "duration", "domain", "sub_category", "url")}
        entry = videos.setdefault(row["video_id"], {**about, "questions": []})
        names = ("question_id", "task_type", "question", "options", "answer")
        entry["questions"].append({**{n: row[n] for n in names}, "response": ""})
    dump(root / "Video-MME.json", list(videos.values()))
    videomme_media(root)


def videomme_hf(root: Path) -> None:
    dump_parquet(root / "videomme" / "test-00000-of-00001.parquet", videomme_rows())
    videomme_media(root)


# ----------------------------------------------------------------------------------------- MVBench

_MVBENCH: dict[str, list[dict[str, Any]]] = {
    "action_sequence": [
        {
            "video": "ZS9XR.mp4",
            "question": "What happened after the person took the food?",
            "candidates": ["Ate the medicine.", "Tidied up the blanket.", "Put down the cup."],
            "answer": "Ate the medicine.",
            "start": 0.25,
            "end": 0.75,
        },
        {
            "video": "ZS9XR.mp4",
            "question": "What happened before?",
            "candidates": ["Opened the door.", "Sat down."],
            "answer": "Sat down.",
            "start": 0.0,
            "end": 0.5,
        },
    ],
    "counterfactual_inference": [
        {
            "video": "video_10009.mp4",
            "question": "Which event will happen if the cube is removed?",
            "candidates": ["The sphere and the cylinder collide"],
            "answer": "The sphere and the cylinder collide",
        },
    ],
    "moving_attribute": [
        {
            "video": "video_10009.mp4",
            "question": "What shape is moving when the video begins?",
            "candidates": ["cube", "sphere", "cube", "cylinder"],
            "answer": "cube",
        },
    ],
    "episodic_reasoning": [
        {
            "video": "castle_s06e01",
            "question": "What did Castle say?",
            "candidates": ["No", "Yes", "Maybe", "Never", "Later"],
            "answer": "Later",
            "start": 1.0,
            "end": 2.0,
            "subtitle": "...",
        },
    ],
}


def mvbench_official(root: Path) -> None:
    for task, rows in _MVBENCH.items():
        dump(root / "json" / f"{task}.json", rows)
    video(root / "video" / "star" / "Charades_v1_480" / "ZS9XR.mp4")
    video(root / "video" / "clevrer" / "video_validation" / "video_10009.mp4")
    frames = root / "video" / "tvqa" / "frames_fps3_hq" / "castle_s06e01"
    frames.mkdir(parents=True)
    for number in range(1, 8):  # readers are tested elsewhere: here only the place counts
        (frames / f"{number:05d}.jpg").write_bytes(b"")


def mvbench_hf(root: Path) -> None:
    """As lmms-eval keeps it: videos cut to the part asked about."""
    for task, rows in _MVBENCH.items():
        dump_parquet(root / task / "train-00000-of-00001.parquet", rows)
    video(root / "star" / "Charades_segment" / "ZS9XR.mp4")
    video(root / "clevrer" / "video_validation" / "video_10009.mp4")
    video(root / "tvqa" / "video_fps3_hq_segment" / "castle_s06e01.mp4")


# -------------------------------------------------------------------------------------------- MLVU

_MLVU_DEV: list[tuple[str, str, str, str, list[str], str]] = [
    # folder and file, type, video, question, candidates, answer
    ("1_plotQA", "plotQA", "movie101_66.mp4", "What colour?",
     ["Red", "Blue", "Grey", "Red"], "Blue"),
    ("1_plotQA", "plotQA", "movie101_66.mp4", "How many?", ["1", "2", "3", "4"], "3"),
    ("1_plotQA", "plotQA", "en_tv_1.mp4", "Who runs?", ["He", "She", "It", "They"], "He"),
    ("2_needle", "findNeedle", "needle_32.mp4", "What falls?", ["A", "cup", "pen", "hat"], "hat"),
    ("4_count", "count", "count_126.mp4", "How often?", ["2", "1", "5", "4"], "5"),
]  # fmt: skip


def mlvu_dev_official(root: Path) -> None:
    files: dict[str, list[dict[str, Any]]] = {}
    for folder, kind, name, question, candidates, answer in _MLVU_DEV:
        files.setdefault(folder, []).append(
            {
                "video": name,
                "duration": 246,
                "question": question,
                "candidates": candidates,
                "answer": answer,
                "question_type": kind,
            }
        )
        video(root / "MLVU" / "video" / folder / name)
    for folder, rows in files.items():
        dump(root / "MLVU" / "json" / f"{folder}.json", rows)
    # The open-ended tasks lie beside them.
    row = {"video": "217.mp4", "question": "Summarise.", "answer": "x", "question_type": "summary"}
    dump(root / "MLVU" / "json" / "9_summary.json", [row])


def mlvu_dev_hf(root: Path) -> None:
    rows = []
    for _, kind, name, question, candidates, answer in _MLVU_DEV:
        listed = "".join(f"({'ABCD'[i]}) {c}\n" for i, c in enumerate(candidates))
        rows.append(
            {
                "video_name": name,
                "duration": 246.0,
                "question": f"{question}\n{listed}",
                "answer": "ABCD"[candidates.index(answer)],
                "task_type": {"findNeedle": "needle"}.get(kind, kind),
            }
        )
        video(root / "mlvu" / name)
    dump_parquet(root / "mlvu" / "data" / "test-00000-of-00001.parquet", rows)


_MLVU_TEST: list[tuple[str, str, str, str, list[str], str]] = [
    ("AR_0", "anomaly_reco", "test_surveil_27.mp4", "Anything unusual?",
     ["Fighting", "Shooting", "Arrest", "Normal", "Shooting", "Vandalism"], "F"),
    ("NQA_3", "needleQA", "test_needle_1.mp4", "What is shown?",
     ["a", "b", "c", "d", "e", "f"], "E"),
    ("NQA_4", "needleQA", "test_needle_1.mp4", "What is heard?",
     ["a", "b", "c", "d", "e", "f"], "A"),
]  # fmt: skip


def mlvu_test_official(root: Path) -> None:
    """Without answers, as published for the leaderboard."""
    rows = []
    for name, kind, film, question, candidates, _ in _MLVU_TEST:
        about = {"question_id": name, "question_type": kind, "video": film, "duration": 297.5}
        rows.append({**about, "question": question, "candidates": candidates})
        video(root / "MLVU_Test" / "video" / film)
    dump(root / "MLVU_Test" / "leaderboard" / "test_question.json", rows)


def mlvu_test_hf(root: Path) -> None:
    rows = []
    for name, kind, film, question, candidates, answer in _MLVU_TEST:
        listed = "".join(f"({'ABCDEF'[i]}) {c}\n" for i, c in enumerate(candidates))
        about = {"question_id": name, "task_type": kind, "video_name": film}
        rows.append({**about, "question": f"{question}\n{listed}", "answer": answer})
        video(root / "mlvu_test" / film)
    dump_parquet(root / "mlvu_test" / "data" / "test-00000-of-00001.parquet", rows)


# ---------------------------------------------------------------------------------- LongVideoBench


def longvideobench_rows(test: bool = False) -> list[dict[str, Any]]:
    rows = []
    for film, number, candidates, right, group, begins in (
        ("86CxyhFV9MI", 0, ["door", "lamp", "phone", "car"], 1, 600, 0.0),
        ("86CxyhFV9MI", 1, ["red", "green"], 0, 600, 0.0),
        ("@user-7", 0, ["a", "b", "c", "d", "e"], 4, 15, 100.0),
    ):
        row = {
            "video_id": film,
            "question": f"What is shown in scene {number}?",
            "question_wo_referring_query": "What is shown?",
            "candidates": candidates,
            "position": [854, 948],
            "topic_category": "NP-News-Programs",
            "question_category": "TOS" if number else "S2E",
            "level": "L2-Relation" if number else "L1-Perception",
            "id": f"{film}_{number}",
            "video_path": f"{film}.mp4",
            "subtitle_path": f"{film}_en.json",
            "duration_group": group,
            "starting_timestamp_for_subtitles": begins,
            "duration": 190.16,
            "view_count": 259852,
        }
        rows.append(row if test else {**row, "correct_choice": right})
    return rows


def _longvideobench_media(root: Path) -> None:
    video(root / "videos" / "86CxyhFV9MI.mp4")
    video(root / "videos" / "@user-7.mp4")
    # Both published forms of subtitles; the second video's begin 100 s into their clock.
    dump(
        root / "subtitles" / "86CxyhFV9MI_en.json",
        [
            {"start": "00:00:00.000", "end": "00:00:00.300", "line": "good morning"},
            {"start": "00:00:05.000", "end": "00:00:09.000", "line": "never seen"},
        ],
    )
    dump(
        root / "subtitles" / "@user-7_en.json",
        [
            {"timestamp": [100.1, 100.3], "text": "first words"},
            {"timestamp": [100.6, None], "text": "last words"},
        ],
    )


def longvideobench_official(root: Path) -> None:
    dump(root / "lvb_val.json", longvideobench_rows())
    dump(root / "lvb_test_wo_gt.json", longvideobench_rows(test=True))
    _longvideobench_media(root)


def longvideobench_hf(root: Path) -> None:
    """Options in columns, "N/A" where there are fewer than five."""
    for name, test in (("validation", False), ("test", True)):
        rows = longvideobench_rows(test)
        for row in rows:
            candidates = row.pop("candidates")
            for i in range(5):
                row[f"option{i}"] = candidates[i] if i < len(candidates) else "N/A"
        dump_parquet(root / f"{name}-00000-of-00001.parquet", rows)
    _longvideobench_media(root)


# --------------------------------------------------------------------------------------- EgoSchema

_EGOSCHEMA = [
    ("0074f737-11cb-497d-8d07-77c3a8127391", "What is the aim?", list("abcde"), 3),
    ("00b9a0de-c59e-49cb-a127-6081e2fb8c8e", "What comes last?", list("vwxyz"), 0),
    ("00f93e1e-cf4e-4835-88b4-4ad68216e86f", "Which is which?", list("pqrst"), None),
]


def egoschema_official(root: Path) -> None:
    rows = []
    for uid, question, options, _ in _EGOSCHEMA:
        row = {"q_uid": uid, "google_drive_id": "1xyz", "question": question}
        rows.append({**row, **{f"option {i}": text for i, text in enumerate(options)}})
        video(root / "good_clips_git" / f"{uid}.mp4")
    dump(root / "questions.json", rows)
    answers = {uid: right for uid, _, _, right in _EGOSCHEMA if right is not None}
    dump(root / "subset_answers.json", answers)


def egoschema_hf(root: Path) -> None:
    full, subset = [], []
    for number, (uid, question, options, right) in enumerate(_EGOSCHEMA):
        lettered = [f"{'ABCDE'[i]}. {text}" for i, text in enumerate(options)]
        row = {"question_idx": str(number), "question": question, "video_idx": uid}
        full.append({**row, "option": lettered, "answer": None})
        if right is not None:
            subset.append({**row, "option": lettered, "answer": str(right)})
        video(root / "videos" / f"{uid}.mp4")
    dump_parquet(root / "GENERATION" / "test-00000-of-00001.parquet", full)
    dump_parquet(root / "Subset" / "test-00000-of-00001.parquet", subset)


# ----------------------------------------------------------------------------------------- LVBench

_LVBENCH = {
    "Cm73ma6Ibcs": [
        ("55", "What year appears in the opening caption of the video?",
         ["1636", "1366", "1363", "1633"], "D", ["key information retrieval"]),
        ("56", "How is the weather?", ["Cloudy", "Snowy", "Sunny", "Rainy"], "B",
         ["event understanding", "reasoning"]),
    ],
    "28CIeC8cZks": [
        ("1", "Who wins?", ["He", "She", "They", "Nobody"], "A", ["reasoning"]),
    ],
}  # fmt: skip


def _lvbench_question(entry: Any, **more: Any) -> dict[str, Any]:
    uid, question, options, answer, kinds = entry
    listed = "".join(f"\n({'ABCD'[i]}) {text}" for i, text in enumerate(options))
    return {
        **more,
        "uid": uid,
        "question": question + listed,
        "answer": answer,
        "question_type": kinds,
        "time_reference": "00:15-00:19",
    }


def lvbench_official(root: Path) -> None:
    rows = []
    for key, questions in _LVBENCH.items():
        qa = [_lvbench_question(entry) for entry in questions]
        rows.append({"key": key, "type": "cartoon", "qa": qa})
        video(root / "videos" / f"{key}.mp4")
    dump_lines(root / "data" / "video_info.meta.jsonl", rows)


def lvbench_hf(root: Path) -> None:
    rows = []
    for key, questions in _LVBENCH.items():
        about = {"key": key, "type": "cartoon", "video_path": f"{key}.mp4"}
        rows += [_lvbench_question(entry, **about) for entry in questions]
        video(root / "all_videos" / f"{key}.mp4")
    dump_parquet(root / "data" / "train-00000-of-00001.parquet", rows)


# ------------------------------------------------------------------------------------- TempCompass

_TEMPCOMPASS: dict[str, dict[str, dict[str, list[dict[str, str]]]]] = {
    "multi-choice": {
        "1034419625": {
            "action": [
                {"question": "What is the man doing?\nA. dunking\nB. dribbling\nC.Both at once",
                 "answer": "B. dribbling"},
                {"question": "Which activity?\nA. passing\nB. running",
                 "answer": "A. passing"},
            ],
            "order": [
                {"question": "What is first?\nA. one\nB. two\nC. three\n D. four",
                 "answer": "C. three"},
            ],
        },
        "1034419625_reverse": {
            "order": [{"question": "What is last?\nA. one\nB. two", "answer": "A. one"}],
        },
    },
    "yes_no": {
        "1034419625": {
            "action": [
                {"question": "Is the man dunking?", "answer": "yes"},
                {"question": "Is the man swimming?", "answer": "no"},
            ]
        },
    },
    "caption_matching": {
        "1034419625": {
            "action": [
                {"question": "Which description is a more suitable match for the video?\n"
                 "Option 1: The man is dribbling.\nOption 2: A man is dunking.",
                 "answer": "Option 2: A man is dunking."},
                {"question": "Which sentence better captures the essence of the video?\n"
                 "Sentence A: A man is dunking.\nSentence B: A person passes.",
                 "answer": "Sentence A: A man is dunking."},
                {"question": "Which caption matches the video better?\n"
                 "Caption A: A man.\nCaption B: A woman.",
                 "answer": "Caption B: A woman."},
            ]
        },
    },
    "captioning": {
        "1034419625": {
            "speed": [
                {"question": "Pick the true information.\nInformation A: fast\nGenerated Caption:",
                 "answer": "A. fast", "mc_question": "How fast?\nA. fast\nB. slow",
                 "mc_answer": "A. fast"},
            ]
        },
    },
}  # fmt: skip


def tempcompass_official(root: Path) -> None:
    for kind, content in _TEMPCOMPASS.items():
        dump(root / "questions" / f"{kind}.json", content)
    for name in _TEMPCOMPASS["multi-choice"]:
        video(root / "videos" / f"{name}.mp4")


def tempcompass_hf(root: Path) -> None:
    for kind, content in _TEMPCOMPASS.items():
        rows = [
            {"video_id": name, "dim": dimension, **question}
            for name, dimensions in content.items()
            for dimension, questions in dimensions.items()
            for question in questions
        ]
        dump_parquet(root / kind / "test-00000-of-00001.parquet", rows)
    for name in _TEMPCOMPASS["multi-choice"]:
        video(root / "videos" / f"{name}.mp4")


# ----------------------------------------------------------------------------------- own questions


def own(root: Path) -> None:
    dump_lines(
        root / "own.jsonl",
        [
            {"id": "a", "video": "clips/a.mp4", "question": "What falls?",
             "options": ["a cup", "a pen"], "answer": "a pen", "start": 0.25, "end": 0.75,
             "subtitles": "a.srt", "categories": {"scene": "kitchen"}},
            {"id": "b", "video": "clips/a.mp4", "question": "Which one?",
             "options": ["x", "y", "z"], "answer": 0, "categories": {"scene": "garden"}},
            {"id": "c", "video": "clips/b.mp4", "question": "What is the boy holding?",
             "answer": "The red ball."},
            {"id": "d", "video": "clips/b.mp4", "question": "And then?"},
        ],
    )  # fmt: skip
    (root / "a.srt").write_text(SRT)
    video(root / "clips" / "a.mp4")
    video(root / "clips" / "b.mp4")
