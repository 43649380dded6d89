"""Comparing results: statistics against SciPy and sums by hand, item sets, tables, plots."""

import csv
import io
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from storm_jax.evaluation import compare_command, compare_results, paired, report, tasks
from storm_jax.evaluation.compare import Answer, CompareError, Result, TaskResult, compare
from storm_jax.evaluation.compare_plots import draw
from storm_jax.evaluation.compare_report import accuracy_csv, markdown, paired_csv
from storm_jax.evaluation.requests import Outcome
from storm_jax.evaluation.results import Samples, write_result

ROOT = Path(__file__).parents[2]

# -------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("b,c", [(0, 0), (0, 1), (3, 3), (1, 9), (9, 1), (25, 40), (700, 801)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert paired.mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def credits(items, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, items).astype(float), (rng.random(items) < 0.7).astype(float)


def test_with_one_item_a_video_it_is_the_paired_t_test():
    a, b = credits(40)
    got = paired.difference(a, b, [f"v{i}" for i in range(40)])
    test = stats.ttest_rel(b, a)
    interval = test.confidence_interval(0.95)
    assert got.value == pytest.approx(b.mean() - a.mean())
    assert got.p == pytest.approx(test.pvalue, rel=1e-9)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (got.first_only, got.second_only) == (((a > b).sum()), (b > a).sum())
    assert (got.items, got.videos) == (40, 40)


def test_with_as_many_items_a_video_it_is_the_t_test_of_their_means():
    a, b = credits(60)
    got = paired.difference(a, b, np.repeat(np.arange(15), 4).astype(str).tolist())
    test = stats.ttest_1samp((b - a).reshape(15, 4).mean(1), 0)
    interval = test.confidence_interval(0.95)
    assert got.p == pytest.approx(test.pvalue, rel=1e-9)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_copies_of_a_question_are_no_further_evidence():
    """McNemar's p falls with copies of every item; the clustered interval stays."""
    a, b = credits(30)
    videos = [str(i) for i in range(30)]
    once = paired.difference(a, b, videos)
    often = paired.difference(np.tile(a, 5), np.tile(b, 5), videos * 5)
    assert (often.low, often.high, often.p) == pytest.approx((once.low, once.high, once.p))
    assert often.mcnemar < once.mcnemar / 3


def test_a_mean_over_groups_by_hand():
    # Group x: d = 1, 0 (videos 1, 2); group y: d = 0, 0, -1, 1 (videos 1, 2, 3, 3).
    got = paired.difference([0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 1], list("121233"), list("xxyyyy"))
    assert got.value == pytest.approx((1 / 2 + 0) / 2)
    # Influences: x: (1 - 1/2) / 4, (0 - 1/2) / 4; y: 0, 0, -1/8, 1/8.
    sums = [0.5 / 4 + 0, -0.5 / 4 + 0, -1 / 8 + 1 / 8]
    se = math.sqrt(3 / 2 * sum(s * s for s in sums))
    reach = 4.302652729911275 * se  # t with 2 degrees of freedom, from a table
    assert (got.low, got.high) == pytest.approx((0.25 - reach, min(1, 0.25 + reach)), rel=1e-9)


def test_unequal_videos_by_hand():
    # d = 1, 1, 0 | -1 | 0, 1: mean 1/3.
    got = paired.difference([0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1], list("aaabcc"))
    sums = [(2 - 1) / 6, (-1 - 1 / 3) / 6, (1 - 2 / 3) / 6]
    se = math.sqrt(3 / 2 * sum(s * s for s in sums))
    assert got.value == pytest.approx(1 / 3)
    assert got.p == pytest.approx(2 * stats.t.sf(1 / 3 / se, 2), rel=1e-9)


def test_equal_answers_and_single_videos_claim_nothing():
    same = paired.difference([0, 1, 1], [0, 1, 1], ["a", "b", "c"])
    # (1 - u)^3 = 2.5 %: three videos do not show that none of many differs.
    u = 1 - 0.025 ** (1 / 3)
    assert (same.value, same.low, same.high) == pytest.approx((0, -u, u))
    assert same.p == same.mcnemar == 1
    one = paired.difference([0] * 9, [1] * 9, ["a"] * 9)
    assert (one.value, one.low, one.high, one.p) == (1, -1, 1, 1)
    always = paired.difference([0] * 20, [1] * 20, [str(i) for i in range(20)])
    assert (always.value, always.high) == (1, 1) and 0.8 < always.low < 0.9 and always.p < 1e-4
    with pytest.raises(ValueError, match="2 and 1 credits of 2 items"):
        paired.difference([0, 1], [1], ["a", "b"])


def test_the_interval_covers_the_truth():
    """Videos of 1 to 6 questions that are alike: 95 % of intervals hold the true difference."""
    rng, hits = np.random.default_rng(3), 0
    for _ in range(400):
        sizes = rng.integers(1, 7, 40)
        videos = np.repeat(np.arange(40), sizes)
        hard = rng.normal(size=40)[videos]
        gain = 0.2 * rng.normal(size=40)[videos]
        a = (hard + rng.normal(size=len(videos)) > 0).astype(float)
        b = (hard + gain + rng.normal(size=len(videos)) > 0).astype(float)
        got = paired.difference(a, b, videos.astype(str).tolist())
        hits += got.low <= 0 <= got.high
    assert 0.92 <= hits / 400 <= 0.98


# -------------------------------------------------------------------------------------- comparison


def answers(credit, kinds="xy", asked="q"):
    """Items 0, 1, ...; two a video; category "kind" in turn."""
    kind = itertools.cycle(kinds)
    return {
        f"i{i}": Answer(f"v{i // 2}", f"{asked}{i}", float(c), {"kind": (next(kind),)})
        for i, c in enumerate(credit)
    }


def result(name, credit, task="t", **fields):
    recipe = fields.pop("recipe", {"frames": {"max": 8}, "prompts": "official"})
    asked = fields.pop("asked", "q")
    mean_over = fields.pop("mean_over", "")
    model = fields.pop("model", name)
    return Result(
        name, {task: TaskResult(mean_over, recipe, model, answers(credit, asked=asked), **fields)}
    )


def test_rows_of_a_task_and_its_categories():
    found = compare([result("a", [1, 0, 1, 0, 1, 0]), result("b", [1, 1, 1, 1, 1, 0])])
    assert [(r.category, r.value) for r in found.rows] == [("", ""), ("kind", "x"), ("kind", "y")]
    accuracies = [[e.value for e in row.estimates] for row in found.rows]
    np.testing.assert_allclose(accuracies, [[3 / 6, 5 / 6], [1, 1], [0, 2 / 3]])
    whole = found.rows[0].differences[1]
    assert found.rows[0].differences[0] is None and whole.value == pytest.approx(2 / 6)
    assert (whole.first_only, whole.second_only, whole.videos) == (0, 2, 3)
    assert not found.notes and not found.recipes


def test_a_macro_metric_is_compared_as_such():
    a, b = [1, 0, 1], [1, 1, 0]  # x: items 0 and 2, y: item 1
    found = compare([result(n, c, mean_over="kind") for n, c in (("a", a), ("b", b))])
    assert [e.value for e in found.rows[0].estimates] == [0.5, 0.75]
    assert found.rows[0].differences[1].value == pytest.approx(0.25)


def test_an_item_with_several_values_counts_in_each():
    a = {"i": Answer("v", "q", 1.0, {"skill": ("x", "y")}), "j": Answer("w", "q", 0.0, {})}
    results = [Result(name, {"t": TaskResult("", {}, name, a)}) for name in "ab"]
    found = [(r.value, r.estimates[0].items) for r in compare(results).rows]
    assert found == [("", 2), ("x", 1), ("y", 1)]


def test_only_common_items_count_and_it_is_said():
    found = compare([result("a", [1, 0, 0, 1]), result("b", [1, 1, 1, 1, 0, 0])])
    assert [e.value for e in found.rows[0].estimates] == [0.5, 1.0]
    assert found.notes == (
        "t: only the 4 items that all results have are counted; 2 of 6 in b are left out",
    )
    assert found.notes[0] in markdown(found)


def test_other_item_sets_are_refused():
    with pytest.raises(
        CompareError, match="t: item i0 is another question in b than in a: r0 and q0"
    ):
        compare([result("a", [1, 0]), result("b", [1, 0], asked="r")])
    other = result("b", [1, 0])
    renamed = {f"n{k}": v for k, v in other.tasks["t"].answers.items()}
    other = Result("b", {"t": TaskResult("", {}, "b", renamed)})
    with pytest.raises(CompareError, match=r"t: .* no scored item in common \(a 2, b 2\)"):
        compare([result("a", [1, 0]), other])
    with pytest.raises(CompareError, match=r"no task is in two .*a: t; b: u"):
        compare([result("a", [1, 0]), result("b", [1, 0], task="u")])
    with pytest.raises(CompareError, match="at least two"):
        compare([result("a", [1, 0])])


def test_a_task_that_one_result_lacks():
    a, b = result("a", [1, 0, 1]), result("b", [1, 1, 1])
    a = Result("a", {**a.tasks, **result("a", [1, 1], task="u").tasks})
    found = compare([a, b])
    assert "u: not run in b" in found.notes
    row = next(r for r in found.rows if r.task == "u")
    assert row.estimates[1] is None and row.differences == (None, None)
    assert "| u | all | 2 | 1 | 100.0 " in markdown(found) and "| - | - |" in markdown(found)


def test_differing_recipes_stand_above_the_table():
    recipes = ({"frames": {"max": 8}, "prompts": "vila"}, {"frames": {"max": 32}, "new": True})
    a, b = (result(n, [1, 0], recipe=r) for n, r in zip("ab", recipes, strict=True))
    found = compare([a, b])
    assert found.recipes == {
        "frames.max": ("8", "32"),
        "new": ("none", "true"),
        "prompts": ("vila", "none"),
    }
    text = markdown(found)
    assert text.index("| frames.max | 8 | 32 |") < text.index("## Accuracy")
    same = markdown(compare([result("a", [1, 0]), result("b", [1, 0])]))
    assert "All recipes are the same." in same


def test_tables_hold_the_numbers():
    credit = ([1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 0], [0] * 6)
    found = compare([result(n, c) for n, c in zip("abc", credit, strict=True)])
    lines = list(csv.DictReader(io.StringIO(accuracy_csv(found))))
    assert len(lines) == 3 * 3
    line = next(x for x in lines if x["result"] == "b" and x["value"] == "y")
    e = found.rows[2].estimates[1]
    assert (float(line["accuracy"]), float(line["low"]), float(line["high"])) == (
        e.value,
        e.low,
        e.high,
    )
    pairs = list(csv.DictReader(io.StringIO(paired_csv(found))))
    assert len(pairs) == 3 * 2
    assert {p["first"] for p in pairs} == {"a"} and {p["second"] for p in pairs} == {"b", "c"}
    whole = next(p for p in pairs if p["category"] == "all" and p["second"] == "c")
    assert (whole["first_only"], whole["second_only"], whole["items"]) == ("3", "0", "6")
    assert float(whole["p_mcnemar"]) == 0.25
    text = markdown(found)
    d = found.rows[0].differences[2]
    shown = f"-50.0 [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    assert f"| t | a | c | {shown} |" in text and "| 3 | 0 | 0.25 |" in text
    assert (
        "t: " not in text
        and "| task | category | items | videos | a | b | c | b - a | c - a |" in text
    )


def test_plots_of_what_the_results_know(tmp_path):
    pytest.importorskip("matplotlib")
    few = result("8 frames", [1, 0, 1, 0], frames=8.0, visual_tokens=64.0)
    many = result("32 frames", [1, 1, 1, 0], frames=32.0, visual_tokens=64.0, latency=0.5)
    found = compare([few, many])
    written = draw(found, tmp_path)
    assert [p.name for p in written] == [
        "accuracy_against_frames.png",
        "accuracy_against_visual_tokens.png",
    ]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert draw(compare([result("a", [1]), result("b", [0])]), tmp_path) == []


# ------------------------------------------------------------------------------------ result files


def evaluated(folder, data, outputs, frames=8, **recipe):
    """An output folder as `storm_jax.evaluate` leaves it, of a model that said `outputs`.

    None: the video could not be read.
    """
    (task,) = tasks.named("own")
    items = task.load(data)[: len(outputs)]
    recipe = {
        "checkpoint": {"path": str(folder), "fingerprint": f"print of {folder.name}"},
        "frames": {"max_frames": frames},
        "prompts": "official",
        **recipe,
    }
    samples = Samples(folder / task.name, recipe)
    for item, output in zip(items, outputs, strict=True):
        bad = dict(finish="error", error=f"{item.video}: corrupt")
        good = dict(output=output, finish="stop", frames=frames, visual_tokens=frames * 4)
        outcome = Outcome(None, **(bad if output is None else good))
        samples.append(report.record(task, item, "official", outcome, data.parent))
    records = samples.merged([item.id for item in items])
    samples.close()
    about = {"missing_videos": [], "items_left_out": 0, "without_subtitles": None}
    run = {"items": len(items), "seconds": 30.0, "compile_seconds": 10.0}
    found, files = report.result(task, items, records, {**about, "recipe": recipe, "run": run})
    write_result(samples.folder, found, files)
    return folder


@pytest.fixture
def questions(tmp_path):
    """Ten questions about five videos; the second option is always right."""
    path = tmp_path / "questions.jsonl"
    lines = [
        {
            "id": str(i),
            "video": f"clips/{i // 2}.mp4",
            "question": f"What comes {i}th?",
            "options": ["a cup", "a pen"],
            "answer": 1,
            "categories": {
                "scene": "kitchen" if i < 4 else "street",
                "skill": ["count", "order"] if i < 2 else "count",
            },
        }
        for i in range(10)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_results_of_the_evaluation_are_read(tmp_path, questions, capsys):
    a = evaluated(tmp_path / "few", questions, list("AABABAAABB"), frames=8)
    b = evaluated(tmp_path / "many", questions, [*"BBBBBBBA", None, ""], frames=32)
    assert compare_command.main([str(a), str(b), f"--out={tmp_path / 'out'}"]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "out" / "comparison.md").read_text()
    assert "| frames.max_frames | 8 | 32 |" in text
    assert "- own, many: no answer found in 1 of 10 outputs (wrong)" in text
    assert "- own, many: 1 videos could not be read; 1 items count as wrong:" in text
    rows = {
        (r["category"], r["value"], r["result"]): r
        for r in csv.DictReader((tmp_path / "out" / "accuracy.csv").open())
    }
    for where, few, many in (
        (("all", ""), 0.4, 0.7),
        (("scene", "kitchen"), 0.25, 1),
        (("scene", "street"), 0.5, 0.5),
        (("skill", "count"), 0.4, 0.7),
        (("skill", "order"), 0, 1),
    ):
        assert float(rows[(*where, "few")]["accuracy"]) == pytest.approx(few)
        assert float(rows[(*where, "many")]["accuracy"]) == pytest.approx(many)
    assert rows["all", "", "few"]["videos"] == "5"
    (pair,) = [
        r
        for r in csv.DictReader((tmp_path / "out" / "paired.csv").open())
        if r["category"] == "all"
    ]
    assert (pair["first_only"], pair["second_only"]) == ("2", "5")
    # Sums of d of the five videos, which have two items each.
    expected = stats.ttest_1samp(np.asarray([2, 1, 1, 1, -2]) / 2, 0)
    assert float(pair["p"]) == pytest.approx(expected.pvalue)
    (first, _) = compare_results.read([a, b])
    assert first.tasks["own"].latency == 2.0 and first.tasks["own"].visual_tokens == 32


def test_folders_that_hold_no_result(tmp_path, questions, capsys):
    a = evaluated(tmp_path / "a", questions, list("AB"))
    (tmp_path / "empty").mkdir()
    begun = tmp_path / "begun"
    Samples(begun / "own", {"frames": 8}).close()
    other = evaluated(tmp_path / "other", questions, list("AB"))
    result_file = other / "own" / "result.json"
    result_file.write_text(result_file.read_text().replace('"format": 1', '"format": 9'))
    broken = evaluated(tmp_path / "broken", questions, list("AB"))
    (broken / "own" / "samples.jsonl").write_text('{"id": "0"}\n')

    def error(*folders):
        assert compare_command.main([str(f) for f in folders]) == 1
        return capsys.readouterr().err

    assert "empty holds no TASK/result.json: give" in error(a, tmp_path / "empty")
    assert "own is not finished" in error(a, begun)
    assert "is the folder of one task: give" in error(a, a / "own")
    assert "nowhere is no folder" in error(a, tmp_path / "nowhere")
    assert "OUT=gs://bucket/out is not on a disk: " in error(a, "gs://bucket/out")
    assert "--out=gs://bucket/out is not on a disk: " in error(a, other, "--out=gs://bucket/out")
    assert "given twice" in error(a, a)
    assert "at least two" in error(a)
    assert "format 9, not 1: evaluate again" in error(a, other)
    assert "broken/own is no result of storm_jax.evaluate (KeyError: 'credit')" in error(a, broken)
    with pytest.raises(SystemExit, match="2"):
        compare_command.main([])


def test_folders_of_the_same_name_and_other_annotations(tmp_path, questions, capsys):
    a = evaluated(tmp_path / "x" / "out", questions, list("AABB"))
    questions.write_text(questions.read_text().replace("a pen", "the pen"))
    b = evaluated(tmp_path / "y" / "out", questions, list("AABB"))
    names = [result.name for result in compare_results.read([a, b])]
    assert names == [str(a), str(b)]
    assert compare_command.main([str(a), str(b)]) == 1
    assert "own: item 0 is another question in" in capsys.readouterr().err


def test_it_is_a_command_of_evaluate(tmp_path, questions):
    """Without the flags that an evaluation needs."""
    folders = [
        str(evaluated(tmp_path / n, questions, list(o))) for n, o in (("a", "AB"), ("b", "BB"))
    ]
    done = subprocess.run(
        [sys.executable, "-m", "storm_jax.evaluate", "compare", *folders],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# Comparison of a, b\n")
