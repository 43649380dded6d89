"""`python -m storm_jax.evidence`: bad input, the report, and the smoke grid as CI runs it."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from storm_jax import evidence
from storm_jax.evidence_grid.answers import Answers
from storm_jax.evidence_grid.grids import CORE, SMOKE
from storm_jax.evidence_grid.recipe import answers_name, described
from storm_jax.evidence_grid.results import Folder

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
TABLE13 = os.path.join(ROOT, "benchmarks", "results", "table13.json")


def made_up(recipe, accuracy):
    """A result file with answers that are right so often, another draw for every point."""
    rng = np.random.default_rng(list(recipe.point.name.encode()))
    tasks = ("colour/4", "direction/4") * 300
    chance = np.array([0.25, 0.5] * 300)
    answers = {}
    for split in ("test_seen", "test"):
        for sampling in (1, 2):
            right = rng.random((recipe.seeds, len(tasks))) < accuracy
            found = Answers(right, tasks, chance, 32 // sampling)
            answers[answers_name(split, sampling)] = found.to_json()
    ms = {"ms": 1.0, "low": 0.9, "high": 1.1}
    return {
        "name": recipe.point.name,
        "recipe": described(recipe),
        "parameters": 10_000,
        "temporal_parameters": 1000,
        "train_step_ms": ms,
        "answer_ms": dict.fromkeys(answers, ms),
        "answers": answers,
        "curves": [],
        "seconds": 1.0,
        "device": "none",
        "versions": {},
    }


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A folder as the core grid leaves it, with made-up answers: Mamba right more often."""
    out = tmp_path_factory.mktemp("core")
    for recipe in CORE.recipes(""):
        accuracy = 0.9 if recipe.point.mixer == "mamba" else 0.7
        Folder(str(out)).write(recipe.point.name, made_up(recipe, accuracy))
    return out


def test_report_fills_the_page(core, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "evidence.md"
    with open(os.path.join(ROOT, "docs", "evidence.md"), encoding="utf-8") as file:
        page.write_text(file.read(), encoding="utf-8")
    command = ["--report", f"--out={core}", f"--latency={TABLE13}", f"--docs={page}"]
    assert evidence.main(command) == evidence.DONE
    first = page.read_text(encoding="utf-8")
    for table in ("table3", "table4", "table5", "table7", "table13"):
        assert (core / "report" / f"{table}.csv").exists()
        assert (tmp_path / "evidence" / f"{table}.png").stat().st_size > 5000
        assert f"![{table}](evidence/{table}.png)" in first
    assert "not run" not in (core / "report" / "table4.md").read_text(encoding="utf-8")
    rows = (core / "report" / "claims.csv").read_text(encoding="utf-8").splitlines()
    better = [r for r in rows if "128 frames: Mamba before temporal pooling is better" in r]
    assert len(better) == 1 and "**reproduced**" in better[0] and ",+2.4," in better[0]
    evidence.main(command)  # filling a filled page changes nothing
    assert page.read_text(encoding="utf-8") == first


def test_latency_ratios_are_those_of_the_file(core):
    evidence.main(["--report", f"--out={core}", f"--latency={TABLE13}", "--noplots"])
    with open(TABLE13, encoding="utf-8") as file:
        runs = json.load(file)["runs"]
    ms = {
        (r["frames"], r["temporal_pool"] * r["temporal_sampling"]): r["first token"]["ms"]
        for r in runs
    }
    rows = (core / "report" / "claims.csv").read_text(encoding="utf-8").splitlines()
    row = next(r for r in rows if "128 frames, 8 times fewer tokens" in r)
    assert f",2.85,{ms[128, 1] / ms[128, 8]:.2f}," in row  # the paper: 4270 / 1500


def test_milliseconds_name_their_device(core, tmp_path):
    """With one device the title does; with several every row, and no ratio is of two of them."""
    pytest.importorskip("matplotlib")
    report = ["--report", "--noplots"]
    assert evidence.main([*report, f"--out={core}"]) == evidence.DONE
    table = (core / "report" / "table4.md").read_text(encoding="utf-8")
    assert "; milliseconds on none**" in table and "device" not in table
    recipes = {recipe.point.name: recipe for recipe in CORE.recipes("table4")}
    for name, recipe in recipes.items():
        device = "H100" if name.startswith("mamba") else "H200"
        Folder(str(tmp_path)).write(name, {**made_up(recipe, 0.8), "device": device})
    with open(TABLE13, encoding="utf-8") as file:
        latency = json.load(file)
    for run in latency["runs"]:
        if run["frames"] == 128 and run["temporal_pool"] == 1:
            run["device"] = "1 x H200"
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps(latency))
    page = tmp_path / "page.md"
    page.write_text("<!-- begin run -->\n<!-- end run -->\n", encoding="utf-8")
    plots = ["--report", f"--out={tmp_path}", f"--latency={mixed}", f"--docs={page}"]
    assert evidence.main(plots) == evidence.DONE
    assert "15 models of 5 seeds each, 3 on H100, 12 on H200;" in page.read_text(encoding="utf-8")
    folder = tmp_path / "report"
    for table in ("table3", "table4", "table5", "table7"):
        title = (folder / f"{table}.md").read_text(encoding="utf-8").splitlines()[0]
        assert "compare milliseconds only between rows of the same device" in title
        with open(folder / f"{table}.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            ours = "H100" if row.get("temporal encoder", "Mamba").startswith("Mamba") else "H200"
            assert row["device"] == ("" if row["tokens"] == "not run" else ours), row
    with open(folder / "table13.csv", encoding="utf-8") as file:
        rows = {(row["frames"], row["compression"]): row for row in csv.DictReader(file)}
    assert rows["128", "1"]["device"] == "1 x H200" != rows["128", "4"]["device"]
    assert rows["128", "4"]["times faster"] == "" and rows["256", "4"]["times faster"]
    claims = (folder / "claims.csv").read_text(encoding="utf-8").splitlines()
    (row,) = [r for r in claims if "128 frames, 4 times fewer tokens" in r]
    assert "**not run**,the two were measured on different devices" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part=table6"], "grid core has the parts table4, table5, table3, table7"),
        (["--only=mamba_t9"], "--only=mamba_t9: the points are"),
        (["--workers=0"], "--workers=0"),
        (["--set=sizes.depth=3"], "--set=sizes.depth=3: write videos.F="),
        (["--set=point.frames=3"], "--set=point.frames=3: write videos.F="),
        (["--set=sizes.width=wide"], "sizes.width='wide' must be of type int"),
        (["--report"], "has no results"),
        (["--out=gs://bucket/x"], "--out=gs://bucket/x is not on a disk: results are appended to"),
        (["--data=s3://bucket/x"], "--data=s3://bucket/x is not on a disk: frames are"),
        (["--report", "--latency=no/such.json"], "has no results"),
    ],
)
def test_mistakes_are_told(arguments, message, tmp_path, capsys):
    assert evidence.main([f"--out={tmp_path}", *arguments]) == evidence.USAGE
    assert message in capsys.readouterr().err


def test_fields_of_a_grid_can_be_set():
    grid = CORE.changed(["short.rate=1e-3", "long.steps=7", "videos.scales=(4,)", "seeds=2"])
    assert grid.short.rate == 1e-3 and grid.seeds == 2 and grid.videos.scales == (4,)
    assert {stage.steps for stage in grid.long.values()} == {7}
    assert grid.parts == CORE.parts and grid.sizes == CORE.sizes


def test_reports_refuse_what_they_cannot_use(core, tmp_path, capsys):
    report = ["--report", f"--out={core}", "--noplots"]
    bad = tmp_path / "bad.json"
    bad.write_text("{}", encoding="utf-8")
    assert evidence.main([*report, f"--latency={bad}"]) == evidence.USAGE
    assert "KeyError: 'runs'" in capsys.readouterr().err
    with open(TABLE13, encoding="utf-8") as file:
        runs = json.load(file)["runs"]
    for change, message in (
        ({"size": "tiny", "frames": 1}, "has runs of size='qwen2_7b' and of 'tiny', whose"),
        ({"device": "1 x H200"}, "has two runs of 4 frames and 1 times fewer tokens: remove one"),
    ):
        bad.write_text(json.dumps({"runs": [*runs, {**runs[0], **change}]}), encoding="utf-8")
        assert evidence.main([*report, f"--latency={bad}"]) == evidence.USAGE
        assert message in capsys.readouterr().err
    bad.write_text('{"runs": [{}]}', encoding="utf-8")
    assert evidence.main([*report, f"--latency={bad}"]) == evidence.USAGE
    assert "cannot be used (KeyError: " in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("<!-- begin table99 -->\n<!-- end table99 -->\n", encoding="utf-8")
    assert evidence.main([*report, f"--docs={page}"]) == evidence.USAGE
    assert "table99" in capsys.readouterr().err


def test_results_of_other_budgets_are_not_mixed(tmp_path, capsys):
    one, two = SMOKE.recipes("")
    folder = Folder(str(tmp_path))
    folder.write(one.point.name, made_up(one, 0.8))
    found = made_up(two, 0.8)
    found["recipe"]["short"]["steps"] = 99
    folder.write(two.point.name, found)
    assert evidence.main(["--report", f"--out={tmp_path}"]) == evidence.USAGE
    assert "differ in short: steps is " in capsys.readouterr().err


@pytest.mark.slow  # a minute or two: every piece in its own processes, on real videos
def test_smoke_grid_then_again(tmp_path):
    command = [sys.executable, "-m", "storm_jax.evidence", "--grid=smoke", f"--out={tmp_path}"]
    command += ["--workers=2", "--decoders=2", "--noplots"]
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT}/kernels")

    def run():
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    first = run()
    assert first.returncode == evidence.DONE, first.stderr
    runs = sorted((tmp_path / "runs").iterdir())
    assert [path.stem for path in runs] == ["mamba_t4_s1_f32", "none_t4_s1_f32"]
    before = [path.read_bytes() for path in runs]
    for text in before:
        found = json.loads(text)
        assert found["train_step_ms"]["ms"] > 0
        answers = Answers.from_json(found["answers"]["test_seen"])
        assert answers.right.shape == (2, 32)
        # A stage without steps leaves an empty curve.
        losses = np.array([loss for curve in found["curves"] for loss in curve.get("loss", ())])
        assert losses.shape[1] == 2 and np.isfinite(losses).all()
        assert losses[-1].mean() < np.log(512)  # better than any token alike
    again = run()
    assert again.returncode == evidence.DONE, again.stderr
    assert "2 of 2 grid points are there already" in again.stderr
    assert [path.read_bytes() for path in runs] == before
