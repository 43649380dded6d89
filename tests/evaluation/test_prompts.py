"""The exact text of every prompt, spelled out."""

from pathlib import Path

import numpy as np
import pytest

from storm_jax.data import subtitles
from storm_jax.data.subtitles import Cue
from storm_jax.evaluation.items import Item, Prompt, TaskError
from storm_jax.evaluation.prompts import at_frames, interleaved
from storm_jax.evaluation.tasks import all_tasks
from storm_jax.frames import ReductionConfig
from tests.evaluation import benchmark_files as write

TASKS = all_tasks()
ITEM = Item("1", "a.mp4", "Which are most?", ("Apples.", "Candles.", "Berries."), 2)
LETTER = "Answer with the option's letter from the given choices directly."
SELECT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond "
    "with only the letter (A, B, C, or D) of the correct option.\n"
)
SELECT_SUBTITLES = SELECT.replace("video.", "video and the subtitles.")
QUESTION = "Which are most?\nA. Apples.\nB. Candles.\nC. Berries.\n"
BRACKETS = "(A) Apples.\n(B) Candles.\n(C) Berries."
MVBENCH_SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, "
    "select the best option that accurately addresses the question."
)
MLVU_SYSTEM = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, "
    "select the best option that accurately addresses the question."
)


def lmms(text: str, tokens: int = 16) -> Prompt:
    return Prompt(text, stop=("\n\n",), max_new_tokens=tokens)


@pytest.mark.parametrize(
    ("task", "family", "expected"),
    [
        ("videomme", "official", Prompt(f"<video>\n{SELECT}{QUESTION}The best answer is:")),
        ("videomme", "vila", Prompt(f"<video>\n{SELECT}{QUESTION}The best answer is:")),
        ("videomme", "lmms", lmms(f"<video>\n{SELECT_SUBTITLES}{QUESTION}\n{LETTER}")),
        (
            "mvbench",
            "official",
            Prompt(
                f"<video>\nQuestion: Which are most?\nOptions:\n{BRACKETS}\n"
                "Only give the best option.",
                system=MVBENCH_SYSTEM,
                answer_prefix="Best option:(",
                max_new_tokens=100,
            ),
        ),
        (
            "mvbench",
            "lmms",
            lmms(
                f"<video>\nQuestion:Which are most?\nOption:\n{BRACKETS}\n"
                "Only give the best option.\n"
            ),
        ),
        (
            "mvbench",
            "vila",
            lmms(
                f"<video>\nQuestion:Which are most?\nOption:\n{BRACKETS}\n"
                "Only give the best option.\n"
            ),
        ),
        (
            "longvideobench_val",
            "official",
            Prompt(f"<video>\nQuestion: {QUESTION}{LETTER}", max_new_tokens=32),
        ),
        ("longvideobench_val", "lmms", lmms(f"<video>\n{QUESTION}{LETTER}\n", 32)),
        ("longvideobench_test", "vila", lmms(f"<video>\n{QUESTION}{LETTER}\n", 32)),
        ("egoschema", "lmms", lmms(f"<video>\n{QUESTION}{LETTER}")),
        (
            "egoschema",
            "vila",
            Prompt(
                "<video>\nWatching the video and answer with the option's letter from the given "
                f"choices directly.{QUESTION}"
            ),
        ),
        ("own", "official", Prompt(f"<video>\n{QUESTION}{LETTER}")),
        ("own", "lmms", Prompt(f"<video>\n{QUESTION}{LETTER}")),
    ],
)
def test_prompts_of_question_and_options(task, family, expected):
    assert TASKS[task].prompt(ITEM, family) == expected


@pytest.mark.parametrize("copy", ["official", "hf"])
def test_prompts_of_mlvu_are_the_same_from_both_copies(copy, tmp_path):
    if copy == "hf":
        pytest.importorskip("pyarrow")
    getattr(write, f"mlvu_dev_{copy}")(tmp_path)
    item = TASKS["mlvu_dev"].load(tmp_path)[1]
    assert TASKS["mlvu_dev"].prompt(item, "official") == Prompt(
        "<video>\nQuestion: How many?\nOptions:\n(A) 1\n(B) 2\n(C) 3\n(D) 4\n"
        "Only give the best option.",
        system=MLVU_SYSTEM,
        answer_prefix="Best Option: (",
        max_new_tokens=100,
    )
    # Hugging Face's questions end in a line break.
    assert TASKS["mlvu_dev"].prompt(item, "lmms") == lmms(
        "<video>\nHow many?\n(A) 1\n(B) 2\n(C) 3\n(D) 4\n\n"
        "Only give the best option.\nBest option: ("
    )
    getattr(write, f"mlvu_test_{copy}")(tmp_path)
    item = TASKS["mlvu_test"].load(tmp_path)[1]
    assert TASKS["mlvu_test"].prompt(item, "lmms") == lmms(
        "<video>\nWhat is shown?\n(A) a\n(B) b\n(C) c\n(D) d\n(E) e\n(F) f\n"
    )


def test_prompts_of_questions_that_hold_their_options(tmp_path: Path):
    write.lvbench_official(tmp_path / "lv")
    item = TASKS["lvbench"].load(tmp_path / "lv")[0]
    text = (
        "<video>\nWhat year appears in the opening caption of the video?\n"
        "(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633"
    )
    assert TASKS["lvbench"].prompt(item, "official") == Prompt(text)
    assert TASKS["lvbench"].prompt(item, "lmms") == lmms(
        f"{text}\nAnswer the question with the option letter"
    )
    write.tempcompass_official(tmp_path / "tc")
    for kind, text, tokens in (
        (
            "multi_choice",
            "What is the man doing?\nA. dunking\nB. dribbling\nC.Both at once"
            "\nPlease directly give the best option:",
            16,
        ),
        ("yes_no", "Is the man dunking?\nPlease answer yes or no:", 16),
        (
            "caption_matching",
            "Which description is a more suitable match for the video?\n"
            "Option 1: The man is dribbling.\nOption 2: A man is dunking."
            "\nPlease directly give the best option:",
            16,
        ),
        ("captioning", "Pick the true information.\nInformation A: fast\nGenerated Caption:", 128),
    ):
        task = TASKS[f"tempcompass_{kind}"]
        item = task.load(tmp_path / "tc")[0]
        expected = Prompt(f"<video>\n{text}", max_new_tokens=tokens)
        assert task.prompt(item, "official") == expected
        assert task.prompt(item, "lmms") == lmms(expected.text, tokens)


# --------------------------------------------------------------------------------------- subtitles

CUES = [Cue(0.0, 1.0, "one"), Cue(2.0, 2.2, "two"), Cue(2.5, 4.0, "three"), Cue(9.0, 9.5, "four")]


def test_only_subtitles_at_the_sampled_frames():
    assert at_frames(CUES, [0.5, 0.9, 2.5, 3.0]) == ["one", "three"]
    assert at_frames(CUES, [1.0, 2.2, 4.0]) == []  # an end belongs to what follows
    assert at_frames(CUES, np.arange(0, 10, 0.25).tolist()) == ["one", "two", "three", "four"]
    prompt = TASKS["videomme"].prompt(ITEM, "official", CUES, [0.5, 3.0], 10.0)
    assert prompt.text == (
        "<video>\nThis video's subtitles are listed below:\none\nthree\n"
        f"{SELECT}{QUESTION}The best answer is:"
    )
    assert TASKS["videomme"].prompt(ITEM, "vila", CUES, [0.5, 3.0], 10.0) == prompt
    # Without any at the frames, or without a file, the prompt is the one without subtitles.
    for cues in (CUES, ()):
        assert TASKS["videomme"].prompt(ITEM, "official", cues, [5.0], 10.0) == (
            TASKS["videomme"].prompt(ITEM, "official")
        )


def test_lmms_reads_subtitles_at_32_frames_whatever_the_model_sees():
    """At 0, 10/31, 20/31, ... seconds: "two" lies between such times."""
    prompt = TASKS["videomme"].prompt(ITEM, "lmms", CUES, [5.0], 10.0)
    head = "<video>\nThis video's subtitles are listed below: \n"
    end = f"\n{SELECT_SUBTITLES}{QUESTION}The best answer is:"
    assert prompt == lmms(f"{head}one\nthree\nfour{end}")
    assert TASKS["videomme"].prompt(ITEM, "lmms", (), [5.0], 10.0) == lmms(
        f"{head}No subtitles available{end}"
    )


def test_frames_and_subtitles_by_time():
    """By hand, from LongVideoBench's rule: a subtitle's place is its middle."""
    text, counts = interleaved(CUES, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], (), 0.0, 10.0)
    # "one": middle 0.5, covers none of 0 < t < 1, not shorter than a second: left out.
    # "two": 0.2 s long, so taken as 1.6 to 2.6, which holds frame 2; its middle 2.1.
    # "three": 2.5 to 4, holds frame 3; its middle 3.25. "four" holds none.
    assert text == "<video>\ntwo\n<video>\nthree\n<video>"
    assert counts == (3, 1, 2)
    # The file's clock starts 100 s before the video's.
    late = [Cue(cue.start + 100, cue.end + 100, cue.text) for cue in CUES]
    assert interleaved(late, [0.0, 1, 2, 3, 4, 5], (), 100.0, 200.0) == (text, counts)
    assert interleaved([], [0.0, 1.0], (), 0.0, 2.0) == ("<video>", (2,))


def test_subtitles_stand_between_groups_of_frames():
    times = np.arange(8.0)
    cues = [Cue(0.5, 1.6, "a"), Cue(3.5, 6.5, "b")]
    pooled = ReductionConfig(temporal_pool=2).frame_groups(8).tolist()  # begin at 0, 2, 4, 6
    assert interleaved(cues, times.tolist(), pooled, 0.0, 8.0) == (
        "<video>\na\n<video>\nb\n<video>",
        (1, 2, 1),
    )
    # Of the groups at 0, 2, 4, 6 the second and the last are left out; "a" covers a frame of the
    # first, "b" has its middle in the third.
    kept = ReductionConfig(temporal_pool=2, temporal_sampling=2).frame_groups(8).tolist()
    assert interleaved(cues, times.tolist(), kept, 0.0, 8.0) == ("<video>\na\n<video>\nb", (1, 1))


def _published_rule(times, cues, offset, duration):
    """LongVideoBench's rule as its description says it, one frame at a time, for every group."""
    order = [(time, 0, i, "<video>") for i, time in enumerate(times)]
    latest = -np.inf
    for i, cue in enumerate(cues):
        start, end = cue.start - offset, min(cue.end - offset, duration)
        middle = (start + end) / 2
        # Subtitles keep their order: none goes before a frame that an earlier one stands behind.
        latest = max(latest, middle)
        if end - start < 1:
            start, end = middle - 0.5, middle + 0.5
        if any(start < time < end for time in times):
            order.append((latest, 1, i, cue.text))
    return [text for *_, text in sorted(order)]


def test_interleaving_equals_an_independent_rule():
    rng = np.random.default_rng(0)
    for _ in range(200):
        times = np.sort(rng.uniform(0, 20, rng.integers(1, 12))).round(2).tolist()
        starts = np.sort(rng.uniform(0, 20, rng.integers(0, 9))).round(2)
        cues = [Cue(s + 3, s + 3 + rng.uniform(0.1, 4), f"t{i}") for i, s in enumerate(starts)]
        if cues:
            cues[-1] = Cue(cues[-1].start, np.inf, "open")
        text, counts = interleaved(cues, times, (), 3.0, 22.0)
        lines = text.split("\n")
        expanded = []
        waiting = iter(counts)
        for line in lines:
            expanded += ["<video>"] * next(waiting) if line == "<video>" else [line]
        assert expanded == _published_rule(times, cues, 3.0, 22.0)


@pytest.mark.parametrize("family", ["official", "lmms"])
def test_longvideobench_with_subtitles(family, tmp_path):
    write.longvideobench_official(tmp_path)
    items = TASKS["longvideobench_val"].load(tmp_path)
    cues = subtitles.read(str(items[2].subtitles))
    times = [0.0, 0.15, 0.4, 0.7, 0.75]
    prompt = TASKS["longvideobench_val"].prompt(items[2], family, cues, times, 1.0)
    body = "What is shown in scene 0?\nA. a\nB. b\nC. c\nD. d\nE. e\n" + LETTER
    body = f"Question: {body}" if family == "official" else f"{body}\n"
    # The last subtitle runs from 0.6 to the end of the video, at 1.
    assert prompt.text == f"<video>\nfirst words\n<video>\nlast words\n{body}"
    assert prompt.groups == (2, 3)
    without = TASKS["longvideobench_val"].prompt(items[2], family, (), times, 1.0)
    assert without.text == f"<video>\n{body}" and without.groups == (5,)


def test_own_subtitles():
    prompt = TASKS["own"].prompt(ITEM, "official", CUES, [0.5], 10.0)
    assert prompt.text == (
        f"<video>\nThis video's subtitles are listed below:\none\n{QUESTION}{LETTER}"
    )
    plain = TASKS["own"].prompt(Item("1", "a.mp4", "Who?"), "official")
    assert plain == Prompt("<video>\nWho?", max_new_tokens=128)


@pytest.mark.parametrize(
    ("task", "family", "cues", "message"),
    [
        ("egoschema", "official", None, "egoschema has no official prompt; it has vila, lmms"),
        ("mlvu_dev", "vila", None, "mlvu_dev has no vila prompt; it has official, lmms"),
        ("lvbench", "vila", None, "lvbench has no vila prompt; it has official, lmms"),
        ("tempcompass_yes_no", "vila", None, "has no vila prompt; it has official, lmms"),
        ("mvbench", "lmms", CUES, "mvbench has no subtitles; ask without them"),
        ("longvideobench_val", "vila", CUES, "no vila prompt with subtitles: .*; use official"),
    ],
)
def test_prompts_that_a_benchmark_does_not_have(task, family, cues, message):
    with pytest.raises(TaskError, match=message):
        TASKS[task].prompt(ITEM, family, cues, [0.5], 10.0)
