"""Evaluation as a user runs it, on real videos: killed, shared, interrupted, with bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from storm_jax.evaluation.tasks import all_tasks
from tests.commands.conftest import ROOT, called, command_environment
from tests.data.media_files import write as write_media
from tests.evaluation import benchmark_files
from tests.evaluation.small_run import QUESTIONS, VIDEOS, write_checkpoint, write_questions

ITEMS = VIDEOS * QUESTIONS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write_questions(folder)
    return folder


def flags(checkpoint, data, out, *more):
    return [f"--checkpoint={checkpoint}", "--tasks=own", f"--data={data}", f"--out={out}", *more]


def start(arguments, env=None):
    """The command as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "storm_jax.evaluate", *arguments],
        cwd=ROOT,
        env=env or command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(folder, name="samples.jsonl"):
    return [json.loads(x) for x in (folder / "own" / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(checkpoint, data, tmp_path_factory):
    """The results of a run that nothing disturbed, and what it printed."""
    out = tmp_path_factory.mktemp("whole")
    process = start(flags(checkpoint, data, out))
    printed, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "accuracy=" in err and "frames/s=" in err  # of the progress bar
    return out, printed


def test_results(whole, data, checkpoint):
    out, printed = whole
    rows = [json.loads(x) for x in (data / "own.jsonl").read_text().splitlines()]
    records = lines(out)
    assert [r["id"] for r in records] == [r["id"] for r in rows]
    assert sorted(x.name for x in (out / "own").iterdir()) == [
        "recipe.json", "result.json", "samples.jsonl",
    ]  # fmt: skip
    result = json.loads((out / "own" / "result.json").read_text())
    right = [r["predicted"] == row["answer"] for r, row in zip(records, rows, strict=True)]
    assert [r["credit"] for r in records] == list(map(float, right))
    assert 0 < sum(right) < ITEMS  # else the test would see nothing
    main = result["score"]["main"]
    assert main["value"] == pytest.approx(sum(right) / ITEMS)
    assert main["low"] < main["value"] < main["high"] and main["videos"] == VIDEOS
    even = [x for x, row in zip(right, rows, strict=True) if row["categories"]["kind"] == "even"]
    assert result["score"]["groups"]["kind"]["even"]["value"] == sum(even) / len(even)
    assert f"{100 * sum(right) / ITEMS:.1f} %" in printed
    assert result["items"] == ITEMS and result["run"]["items"] == ITEMS
    assert result["health"]["unparsed"] == sum(r["predicted"] is None for r in records)
    # Each segment of each video was encoded once.
    assert result["run"]["frames"] == sum(
        {(r["video"], r["start"]): r["frames"] for r in records}.values()
    )
    recipe = result["recipe"]
    assert recipe == json.loads((out / "own" / "recipe.json").read_text())
    assert recipe["checkpoint"]["path"] == str(checkpoint) and recipe["checkpoint"]["fingerprint"]
    assert recipe["frames"]["max_frames"] == 8 and recipe["frames"]["rule"].startswith("evenly")
    assert recipe["decoding"]["greedy"] and recipe["prompts"] == "official"
    assert recipe["versions"]["storm_jax"] and recipe["chat_template"] == "gemma"
    assert records[0]["prompt"][0]["text"].startswith("<video>\nWhat is shown in 0?\nA. a square")


def test_killed_and_started_again(whole, checkpoint, data, tmp_path):
    process = start(flags(checkpoint, data, tmp_path, "--slots=1"))
    part = tmp_path / "own" / "samples-00000.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (part.exists() and part.stat().st_size > 300):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = part.read_bytes()
    assert 0 < done.count(b"\n") < ITEMS and not (tmp_path / "own" / "result.json").exists()
    with part.open("ab") as file:
        file.write(b'{"id": "0-0", "cut of')  # as a kill within a write leaves it
    (status, _, err), (other, _, why) = called(
        "evaluate",
        [
            (flags(checkpoint, data, tmp_path, "--slots=1"), ""),
            (flags(checkpoint, data, tmp_path / "b", "--slots=1"), ""),
        ],
    )
    assert (status, other) == (0, 0), err + why
    merged = (tmp_path / "own" / "samples.jsonl").read_bytes()
    assert merged == (tmp_path / "b" / "own" / "samples.jsonl").read_bytes()
    assert merged == (whole[0] / "own" / "samples.jsonl").read_bytes()  # of eight slots
    result = json.loads((tmp_path / "own" / "result.json").read_text())
    assert result["run"]["items"] == ITEMS - done.count(b"\n")


@pytest.mark.exhaustive  # two engines: evaluation/test_answering.py
@pytest.mark.slow
def test_eight_devices_answer_as_one(whole, checkpoint, data, tmp_path):
    env = command_environment()
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    process = start(flags(checkpoint, data, tmp_path), env)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads((tmp_path / "own" / "result.json").read_text())["run"]["engines"] == 8
    same = (tmp_path / "own" / "samples.jsonl").read_bytes()
    assert same == (whole[0] / "own" / "samples.jsonl").read_bytes()
    process = start(flags(checkpoint, data, tmp_path / "2", "--devices_per_engine=2"), env)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    result = json.loads((tmp_path / "2" / "own" / "result.json").read_text())
    assert (result["run"]["engines"], result["recipe"]["engine"]["devices"]) == (4, 2)


def test_shared_by_processes_and_bad_videos(whole, checkpoint, data, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    videos = sorted((broken / "videos").iterdir())
    content = videos[1].read_bytes()
    videos[1].write_bytes(content[:300] + bytes(len(content) - 300))
    videos[2].rename(broken / "away.mp4")
    a, b, c = (tmp_path / x for x in "abc")
    two, back = "--processes=2", flags(checkpoint, broken, a, "--allow_missing")
    first, second, missing, partial, again, limited, subtitles, late = called(
        "evaluate",
        [
            (flags(checkpoint, data, c, two), ""),
            (flags(checkpoint, data, c, two, "--process=1"), ""),
            (flags(checkpoint, broken, a), ""),
            (back, ""),
            (back, ""),
            (flags(checkpoint, broken, b, "--limit=2", "--frames=4"), ""),
            (flags(checkpoint, data, tmp_path / "d", "--limit=2", "--subtitles"), ""),
            (flags(checkpoint, data, tmp_path / "e", "--limit=2", "--decode_timeout=1e-6"), ""),
        ],
    )
    for status, _, err in (first, second, partial, again, limited, subtitles, late):
        assert status == 0 and "Traceback" not in err, err
    # Two processes, which need nothing but the folder.
    assert "this process is done" in first[2] and "accuracy" not in first[1]
    assert "accuracy" in second[1]
    expected = (whole[0] / "own" / "samples.jsonl").read_bytes()
    assert (c / "own" / "samples.jsonl").read_bytes() == expected
    # All missing ones are listed before anything runs.
    assert missing[0] == 1 and f"own: {videos[2]}" in missing[2]
    assert "1 videos are missing" in missing[2] and "--allow_missing" in missing[2]
    result = json.loads((a / "own" / "result.json").read_text())
    assert result["missing_videos"] == [str(videos[2])]
    assert result["items_left_out"] == QUESTIONS and result["items"] == ITEMS - QUESTIONS
    assert "PARTIAL: 1 videos are missing, 3 items left out" in partial[1]
    # A corrupt one counts as wrong and is listed.
    (name,) = result["health"]["failed_videos"]
    assert name == f"videos/{videos[1].name}"
    failed = [r for r in lines(a) if r["error"]]
    assert len(failed) == QUESTIONS == result["health"]["items_of_failed_videos"]
    assert all(r["credit"] == 0 and r["finish"] == "error" for r in failed)
    assert "1 videos could not be read; 3 items count as wrong" in partial[1]
    # Nothing is asked twice, and the measured time stays that of the run which took it.
    assert json.loads((a / "own" / "result.json").read_text())["run"]["items"] == ITEMS - QUESTIONS
    assert [r["frames"] for r in lines(b)] == [4, 0]
    titled = lines(tmp_path / "d")
    assert "This video's subtitles are listed below:\nearly\n" in titled[0]["prompt"][0]["text"]
    assert "late" not in titled[0]["prompt"][0]["text"]
    assert "subtitles" not in titled[1]["prompt"][0]["text"]
    assert "2 videos could not be read; 2 items count as wrong" in late[1]
    assert "took longer than 1e-06 s to decode" in late[1]
    # What was missing or broken comes back.
    (broken / "away.mp4").rename(videos[2])
    videos[1].write_bytes(content)
    ((status, _, err),) = called("evaluate", [([*back, "--retry_failed"], "")])
    assert status == 0, err
    assert (a / "own" / "samples.jsonl").read_bytes() == expected


def test_refusals(whole, checkpoint, data, tmp_path):
    used = tmp_path / "used"
    shutil.copytree(whole[0], used)
    (tmp_path / "no").mkdir()
    (tmp_path / "srt").mkdir()
    shutil.copytree(data / "videos", tmp_path / "srt" / "videos")
    (tmp_path / "srt" / "a.srt").write_text("1\nno times\n")
    shutil.copy(data / "own.jsonl", tmp_path / "srt")
    new = tmp_path / "new"
    cases = [
        (1, ["answers of another recipe", 'frames.max_frames: 8 there, 4 asked for',
             'prompts: "official" there, "vila" asked for'],
         flags(checkpoint, data, used, "--frames=4", "--prompts=vila")),
        (1, ["annotations: "], flags(checkpoint, tmp_path / "srt" / "x.jsonl", used)),
        (2, ["--temporal_pool=4: this checkpoint was trained with temporal_pool=2"],
         flags(checkpoint, data, new, "--temporal_pool=4")),
        (3, ["12 of 12 prompts with the longest answer do not fit --context=64", "needs 1"],
         flags(checkpoint, data, new, "--context=64")),
        (1, ["no task 'nonesuch'; there are", "videomme"],
         [*flags(checkpoint, data, new), "--tasks=nonesuch"]),
        (1, ["holds no annotations"], flags(checkpoint, tmp_path / "no", new)),
        (1, ["no checkpoint at"], flags(tmp_path, data, new)),
        (1, ["subtitles that cannot be read", "a.srt:1: expected"],
         flags(checkpoint, tmp_path / "srt", tmp_path / "s", "--subtitles")),
        (2, ["--process=2 of --processes=2"],
         flags(checkpoint, data, new, "--processes=2", "--process=2")),
        (2, ["--retry_failed changes"],
         flags(checkpoint, data, new, "--processes=2", "--retry_failed")),
        (2, ["devices_per_engine=2 does not divide the 1 devices"],
         flags(checkpoint, data, new, "--devices_per_engine=2")),
        (2, ["--temperature=-1.0: it must be"], flags(checkpoint, data, new, "--temperature=-1")),
        (2, ["--out=gs://bucket/out is not on a disk: results are appended to", "copy it up"],
         flags(checkpoint, data, "gs://bucket/out")),
        (2, ["--data=gs://bucket/data is not on a disk: ", "copy them to a disk, or give where"],
         flags(checkpoint, "gs://bucket/data", new)),
        (2, ["Flag --out must have a value"], flags(checkpoint, data, new)[:-1]),
        (2, ["arguments not understood: x"], [*flags(checkpoint, data, new), "x"]),
    ]  # fmt: skip
    rows = [json.loads(x) for x in (data / "own.jsonl").read_text().splitlines()]
    rows[0]["answer"] = (rows[0]["answer"] + 1) % 3
    (tmp_path / "srt" / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = called("evaluate", [(arguments, "") for _, _, arguments in cases])
    for (status, messages, arguments), (got, out, err) in zip(cases, found, strict=True):
        assert (got, out) == (status, ""), (arguments, err)
        assert "Traceback" not in err, err
        for message in messages:
            assert message in err, (arguments, err)
    assert (used / "own" / "samples.jsonl").read_bytes() == (
        whole[0] / "own" / "samples.jsonl"
    ).read_bytes()


@pytest.mark.slow
def test_every_benchmark(checkpoint, tmp_path):
    layouts = {
        "Video-MME": benchmark_files.videomme_official,
        "MVBench": benchmark_files.mvbench_official,
        "MLVU": benchmark_files.mlvu_dev_official,
        "": benchmark_files.mlvu_test_official,  # makes its folder
        "LongVideoBench": benchmark_files.longvideobench_official,
        "EgoSchema": benchmark_files.egoschema_official,
        "LVBench": benchmark_files.lvbench_official,
        "TempCompass": benchmark_files.tempcompass_official,
    }
    for name, write in layouts.items():
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        write(tmp_path / "data" / name)
    for frame in (tmp_path / "data" / "MVBench").rglob("*.jpg"):  # empty ones
        write_media(frame, 1, codec="png", format="image2", pix_fmt="rgb24")
    tasks = all_tasks()
    del tasks["own"]
    arguments = [
        f"--checkpoint={checkpoint}", f"--tasks={','.join(tasks)}", f"--data={tmp_path / 'data'}",
    ]  # fmt: skip
    titled = ["--subtitles", "--tasks=longvideobench_val,videomme"]
    (status, out, err), (other, shown, why) = called(
        "evaluate",
        [
            ([*arguments, f"--out={tmp_path / 'a'}"], ""),
            ([*arguments, f"--out={tmp_path / 'b'}", *titled], ""),
        ],
    )
    assert (status, other) == (0, 0), err + why
    for name, task in tasks.items():
        items = {item.id: item for item in task.load(tmp_path / "data")}
        result = json.loads((tmp_path / "a" / name / "result.json").read_text())
        assert result["items"] == len(items) and not result["health"]["failed_videos"], name
        assert result["recipe"]["prompts"] == task.families[0] and f"{name}  (" in out
        text = (tmp_path / "a" / name / "samples.jsonl").read_text()
        for record in map(json.loads, text.splitlines()):
            item = items[record["id"]]
            prompt = task.prompt(item, task.families[0])
            assert record["prompt"][-1]["text"] == prompt.text
            assert record["answer_prefix"] == prompt.answer_prefix
            assert record["predicted"] == task.extract(record["output"], item, task.families[0])
            assert record["frames"] and record["visual_tokens"] and record["finish"] != "error"
    for name in ("egoschema", "longvideobench_test", "mlvu_test", "tempcompass_captioning"):
        folder = tmp_path / "a" / name
        files = {x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()}
        assert files > {"recipe.json", "result.json", "samples.jsonl"}, name
    between = (tmp_path / "b" / "longvideobench_val" / "samples.jsonl").read_text()
    assert any(
        json.loads(x)["prompt"][-1]["text"].count("<video>") > 1 for x in between.splitlines()
    )


@pytest.mark.slow
def test_interrupted(checkpoint, data, tmp_path):
    process = start(flags(checkpoint, data, tmp_path))
    part = tmp_path / "own" / "samples-00000.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (part.exists() and part.stat().st_size):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 0), err  # 0: it was faster
    assert "Traceback" not in err
