import collections
import os

import numpy as np
import pytest

from storm_jax.data.drawing import write_video
from storm_jax.data.formats.json_file import JsonFile
from storm_jax.data.synthetic import CHANCE, main, make_clip, write_split
from storm_jax.data.video import decode, probe

GROUP = 4


def clips(task, count, seed=0):
    return [make_clip(task, i, np.random.default_rng([seed, i])) for i in range(count)]


def decoded(frames, folder):
    path = str(folder / "clip.mp4")
    write_video(path, frames)
    return decode(path, n=len(frames))[0]


# ------------------------------------------------------------------------------------ the questions


def visible_in(clip):
    """Which frames show an object: saturated colour, which backgrounds do not have."""
    return [(np.ptp(f.astype(float), axis=-1) > 100).sum() > 8 for f in clip.frames]


def dominant(rgb):
    """The name of a mean colour."""
    red, green, blue = rgb
    if blue > max(red, green):
        return "blue"
    if red > 1.5 * green:
        return "red"
    return "green" if green > 1.5 * red else "yellow"


def test_direction_is_what_happens():
    for clip in clips("direction", 40):
        frames = clip.frames.astype(float)
        change = np.abs(frames - np.median(frames, axis=0)).max(-1)
        seen = [i for i, c in enumerate(change) if (c > 60).sum() > 8]
        # Visible in all frames of one group, and in no other: nothing stands still beside it.
        assert (
            len(seen) == GROUP
            and seen[0] % GROUP == 0
            and seen == list(range(seen[0], seen[0] + 4))
        )
        weight = change[seen] * (change[seen] > 60)
        y, x = np.mgrid[:32, :32]
        centre = {"x": (weight * x).sum((1, 2)), "y": (weight * y).sum((1, 2))}
        steps = {k: np.diff(v / weight.sum((1, 2))) for k, v in centre.items()}
        axis, sign = {"left": ("x", -1), "right": ("x", 1), "up": ("y", -1), "down": ("y", 1)}[
            clip.answer
        ]
        assert (steps[axis] * sign > 1.5).all(), clip
        assert (np.abs(steps["y" if axis == "x" else "x"]) < 1.5).all()
        assert f"move {'left or right' if axis == 'x' else 'up or down'}?" in clip.question


def test_order_shows_one_object_after_the_other():
    for clip in clips("order", 24):
        assert clip.answer in clip.question
        first, second = clip.question.removeprefix("Which came first, the ")[:-1].split(" or the ")
        assert clip.answer in (first, second) and first != second
        # Each for a whole group, at places of its own.
        change = np.abs(clip.frames[:GROUP].astype(float).mean(0) - clip.frames[GROUP:].mean(0))
        assert (change.max(-1) > 60).sum() > 16
        for group in (clip.frames[:GROUP], clip.frames[GROUP:]):
            assert np.abs(group.astype(float) - group.mean(0)).mean() < 8
        saturated = np.ptp(clip.frames[0].astype(float), axis=-1) > 90
        assert dominant(clip.frames[0][saturated].mean(0)) == clip.answer.split()[0]


def test_count_is_the_number_of_flashes():
    for clip in clips("count", 60):
        seen = np.array(visible_in(clip))
        flashes = (np.diff(np.concatenate([[0], seen.astype(int)])) == 1).sum()
        assert str(flashes) == clip.answer, clip.question


def test_frame_names_the_colour_of_that_frame():
    for clip in clips("frame", 40):
        number = int(clip.question.split("in frame ")[1].split(" of 8")[0])
        saturated = np.ptp(clip.frames.astype(float), axis=-1).mean(0) > 90
        colours = [dominant(f[saturated].mean(0)) for f in clip.frames]
        assert colours[number - 1] == clip.answer
        for group in (colours[:GROUP], colours[GROUP:]):
            assert sorted(group) == ["blue", "green", "red", "yellow"]


@pytest.mark.parametrize("task, answers", [("direction", 4), ("count", 3), ("frame", 4)])
def test_answers_are_equally_frequent(task, answers):
    count = collections.Counter(clip.answer for clip in clips(task, 12 * answers))
    assert set(count.values()) == {12} and len(count) == answers
    assert CHANCE[task] == 1 / (answers if task != "direction" else answers / 2)


def test_order_answers_do_not_follow_the_question():
    first = collections.Counter(
        clip.question.split("the ")[1].split(" or")[0] == clip.answer for clip in clips("order", 60)
    )
    assert first == {True: 30, False: 30}


def test_the_number_of_lit_frames_tells_no_count():
    lit = collections.defaultdict(list)
    for clip in clips("count", 600):
        lit[clip.answer].append(sum(visible_in(clip)))
    means = [np.mean(lit[answer]) for answer in "123"]
    assert {x for answer in "123" for x in lit[answer]} == {3, 4, 5, 6}
    assert np.ptp(means) < 0.35  # standard error of a mean is 0.08


# -------------------------------------------------------------- no direction without order in time


@pytest.mark.parametrize("task", ["direction", "frame"])
def test_a_group_and_its_reverse_decode_to_the_same_frames(task, tmp_path):
    """Then nothing computed from a mean over the group, however exactly, can tell them apart."""
    for clip in clips(task, 8):
        order = np.arange(8)
        for start in (0, GROUP):
            order[start : start + GROUP] = order[start : start + GROUP][::-1]
        there = decoded(clip.frames, tmp_path)
        back = decoded(clip.frames[order], tmp_path)
        np.testing.assert_array_equal(back, there[order])
        assert (there != back).any()


def features(frames):
    """What a probe sees of one clip: 8x8 cells of how far each frame is from the background."""
    frames = frames.astype(float)
    change = np.abs(frames - np.median(frames, axis=0)).max(-1)
    return change.reshape(len(frames), 8, 4, 8, 4).mean((2, 4)) / 50


def pooled_features(frames):
    """The same from group means, and the means themselves."""
    means = frames.astype(float).reshape(-1, GROUP, *frames.shape[1:]).mean(1)
    change = np.abs(means - means.mean(0)).max(-1)
    cells = [x.reshape(len(x), 8, 4, 8, 4).mean((2, 4)) for x in (change, means.mean(-1))]
    return np.concatenate([cells[0] / 12, (cells[1] - 128) / 60])


def probe_accuracy(x, y, x_test, y_test, ridge=3.0):
    """Held-out accuracy of logistic regression, fitted by Newton's method."""
    mean = x.mean(0)
    x, x_test = (np.c_[a - mean, np.ones(len(a))] for a in (x, x_test))
    w = np.zeros(x.shape[1])
    for _ in range(12):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        hessian = (x * (p * (1 - p) + 1e-4)[:, None]).T @ x + ridge * np.eye(len(w))
        w -= np.linalg.solve(hessian, x.T @ (p - y) + ridge * w)
    return ((x_test @ w > 0) == y_test).mean()


def test_a_probe_needs_the_order_of_the_frames(tmp_path):
    """Left or right: 300 clips to learn from, 400 to answer, decoded from H.264.

    On 400 balanced answers the standard error at chance is 2.5 points, so 40 to 60 % is four of
    them either way.
    """
    items = [i for i in range(1400) if i // 2 % 2 == 0]  # the axis of left and right
    ordered, pooled, right = [], [], []
    for i in items:
        clip = make_clip("direction", i, np.random.default_rng([5, i]))
        frames = decoded(clip.frames, tmp_path)
        ordered.append(features(frames).ravel())
        pooled.append(pooled_features(frames).ravel())
        right.append(clip.answer == "right")
    ordered, pooled, right = np.array(ordered), np.array(pooled), np.array(right)
    assert right[300:].mean() == 0.5
    split = slice(None, 300), slice(300, None)
    accuracy = {
        name: probe_accuracy(x[split[0]], right[split[0]], x[split[1]], right[split[1]])
        for name, x in (("ordered", ordered), ("pooled", pooled))
    }
    assert accuracy["ordered"] > 0.9, accuracy
    assert 0.4 < accuracy["pooled"] < 0.6, accuracy


# ------------------------------------------------------------------------------------------- files


def test_written_data_set(tmp_path, capsys):
    out = str(tmp_path / "new" / "data")
    main([f"--out={out}", "--train=8", "--test=4", "--seed=3"])
    assert "train.jsonl: 8 records" in capsys.readouterr().out
    train, test = (JsonFile(os.path.join(out, f"{name}.jsonl")) for name in ("train", "test"))
    assert len(train) == 8 and len(test) == 4
    assert [train[i].task for i in range(4)] == ["direction", "order", "count", "frame"]
    paths = {r.media[0].path for data in (train, test) for r in (data[i] for i in range(len(data)))}
    assert len(paths) == 12
    for path in paths:
        found = probe(path)
        assert (found.codec, found.frames, found.fps, found.width) == ("h264", 8, 8.0, 32)
    record = train[0]
    assert record.turns[0].text.startswith("<video>\nDid the ") and len(record.turns) == 2
    clip = make_clip(
        "direction", 0, np.random.default_rng([3, int.from_bytes(b"train", "little"), 0])
    )
    assert clip.answer == record.turns[1].text
    frames, _ = decode(record.media[0].path, n=8)
    assert np.abs(frames.astype(float) - clip.frames).mean() < 6  # coded in colour at half size


def test_same_seed_same_files_and_no_video_in_both_splits(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        for name in ("train", "test"):
            write_split(str(tmp_path / folder), name, 40, seed)
    data = {
        folder: {p.name: p.read_bytes() for p in (tmp_path / folder / "videos").iterdir()}
        for folder in "abc"
    }
    assert data["a"] == data["b"]
    assert len(set(data["a"].values()) | set(data["c"].values())) == 160
    assert (tmp_path / "a/test.jsonl").read_text() == (tmp_path / "b/test.jsonl").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tasks=("direction", "colour")), "known families are direction"),
        (dict(frames=9), "multiple of group"),
        (dict(frames=4), "at least 6"),
        (dict(size=31), "must be even"),
        (dict(group=2, tasks=("frame",)), "multiple of 4"),
        (dict(group=1, tasks=("direction",)), "motion needs two frames"),
    ],
)
def test_arguments(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_split(str(tmp_path), "train", 1, 0, **change)


def test_other_lengths_and_sizes(tmp_path):
    path = write_split(str(tmp_path), "train", 8, 0, frames=24, size=64, group=8)
    for i in range(8):
        record = JsonFile(path)[i]
        frames, _ = decode(record.media[0].path, n=100)
        assert frames.shape == (24, 64, 64, 3)
