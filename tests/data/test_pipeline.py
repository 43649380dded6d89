"""The whole data path on real files: mp4 and images on disk, to batches."""

import dataclasses
import json
import os
import time

import numpy as np
import pytest

from storm_jax.config import VISUAL, DataConfig, FrameConfig, SourceConfig
from storm_jax.data import pipeline, text, video
from storm_jax.data.drawing import write_video
from storm_jax.data.formats.json_file import JsonFile
from storm_jax.data.load import LoadMeter
from storm_jax.data.records import Media
from storm_jax.data.sources import DataError
from tests.data.record_files import clip, make_set, record, write_image, write_records
from tests.data.small_model import small_model

MODEL = small_model(image_size=32, patch_size=16)  # 4 visual tokens for 2 frames
TOKENS = 160  # of a row


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer("bytes")


def data_config(*train, **changes):
    settings = DataConfig(
        train=train,
        eval=train,
        frames=FrameConfig(max_frames=8),
        tokenizer="bytes",
        chat_template="gemma",
        sequence_length=TOKENS,
        row_frames=12,
        pack=True,
        max_bad_fraction=0.5,
    )
    return dataclasses.replace(settings, **changes)


def train(data, tokenizer, **arguments):
    """All batches, and the object that they came from."""
    arguments = {"batch": 4, "steps": 6, **arguments}
    with pipeline.train_batches(data, MODEL, tokenizer, **arguments) as batches:
        return list(batches), batches


def ids(batches):
    return [[info.id for info in row] for batch in batches for row in batch.info.rows]


def assert_equal(first, second):
    """Batches that are equal to the last bit."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.info == b.info
        assert a.arrays.keys() == b.arrays.keys()
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name], strict=True)


def interleave(shares):
    """The global batches from those of all processes: row p of the P processes' rows is theirs."""
    batches = []
    for parts in zip(*shares, strict=True):
        arrays = {
            name: np.stack([part.arrays[name] for part in parts], 1).reshape(
                -1, *parts[0].arrays[name].shape[1:]
            )
            for name in parts[0].arrays
        }
        rows = sum(zip(*(part.info.rows for part in parts), strict=True), ())
        errors = sum((part.info.errors for part in parts), ())
        batches.append(pipeline.Batch(arrays, pipeline.BatchInfo(rows, errors)))
    return batches


# ---------------------------------------------------------------------------------------- content


def test_content_of_a_packed_row(tmp_path, tokenizer):
    """A video, two images and text in one row, against arrays put together by hand."""
    write_video(str(tmp_path / "v.mp4"), clip(5, 0))
    write_image(tmp_path / "a.png", 1)
    write_image(tmp_path / "b.png", 2)
    source = write_records(
        tmp_path / "set.jsonl",
        [
            record("text", [], "hello", "hi"),
            record("images", [("image", "a.png"), ("image", "b.png")], "same?", "no"),
            record("video", [("video", "v.mp4")], "what?", "ok"),
        ],
    )
    (batch,), batches = train(data_config(source), tokenizer, batch=1, steps=1)
    assert batches.known_bad == () and batches.usable == 3 and batch.info.errors == ()
    assert [(s.id, s.source, s.task) for s in batch.info.rows[0]] == [
        ("video", "set", "wha"),  # best fit takes the largest first
        ("images", "set", "sam"),
        ("text", "set", "hel"),
    ]
    row = {name: array[0] for name, array in batch.arrays.items()}

    def frames(kind, name):
        return video.sample(Media(kind, str(tmp_path / name)), FrameConfig(8), 32)[0]

    pictures = [frames("video", "v.mp4"), frames("image", "a.png"), frames("image", "b.png")]
    assert [len(p) for p in pictures] == [5, 1, 1]
    np.testing.assert_array_equal(row["frames"][:7], np.concatenate(pictures))
    assert not row["frames"][7:].any()
    assert row["frame_segments"].tolist() == [0] * 5 + [1, 2] + [-1] * 5
    assert row["frame_groups"].tolist() == [0, 0, 1, 1, 2, 3, 4] + [-1] * 5

    def conversation(visual, question, answer):
        head = [257, 259, *b"user\n", *[VISUAL] * visual, *question, 260, *b"\n"]
        head += [259, *b"model\n"]
        learnt = [*answer, 260]
        tokens = [*head, *learnt, *b"\n"]
        targets = [-1] * (len(head) - 1) + learnt + [-1, -1]
        return tokens, targets

    samples = [
        conversation(3 * 4, b"what?", b"ok"),
        conversation(2 * 4, b"same?", b"no"),
        conversation(0, b"hello", b"hi"),
    ]
    tokens, targets, segments, positions = [], [], [], []
    for number, (its_tokens, its_targets) in enumerate(samples):
        tokens += its_tokens
        targets += its_targets
        segments += [number] * len(its_tokens)
        positions += range(len(its_tokens))
    rest = TOKENS - len(tokens)
    assert row["tokens"].tolist() == tokens + [0] * rest
    assert row["targets"].tolist() == targets + [-1] * rest
    assert row["segments"].tolist() == segments + [-1] * rest
    assert row["positions"].tolist() == positions + [0] * rest


def test_visual_positions_match_pooled_frames_in_every_row(tmp_path, tokenizer):
    got, _ = train(data_config(make_set(tmp_path, "a")), tokenizer)
    for batch in got:
        groups = batch.arrays["frame_groups"].max(1) + 1
        visual = (batch.arrays["tokens"] == VISUAL).sum(1)
        np.testing.assert_array_equal(visual, groups * MODEL.group_tokens)
        samples = batch.arrays["segments"].max(1) + 1
        assert samples.tolist() == [len(row) for row in batch.info.rows]
    assert max(len(row) for batch in got for row in batch.info.rows) > 1


def test_start_and_end_of_a_clip_reach_the_decoder(tmp_path, tokenizer):
    write_video(str(tmp_path / "v.mp4"), clip(8, 0))  # 8 frames a second
    part = record("part", [("video", "v.mp4")], "?")
    part["media"][0].update(start=0.25, end=0.5)
    source = write_records(tmp_path / "set.jsonl", [part])
    (batch,), _ = train(data_config(source), tokenizer, batch=1, steps=1)
    whole = video.sample(Media("video", str(tmp_path / "v.mp4")), FrameConfig(8), 32)[0]
    assert (batch.arrays["frame_segments"][0] == 0).sum() == 3
    np.testing.assert_array_equal(batch.arrays["frames"][0, :3], whole[2:5])


# ---------------------------------------------------------------------- order, processes, resuming


def test_a_pass_holds_every_record_once(tmp_path, tokenizer):
    data = data_config(make_set(tmp_path, "a"), pack=False)
    got, _ = train(data, tokenizer, batch=4, steps=8)
    names = sum(ids(got), [])
    assert len(set(names[:16])) == 16 and sorted(names[:16]) == sorted(names[16:])
    assert names[:16] != names[16:]


def test_mixture_by_weight(tmp_path, tokenizer):
    first, second = make_set(tmp_path, "a", videos=4), make_set(tmp_path, "b", videos=20)
    weighted = (dataclasses.replace(first, weight=3.0), dataclasses.replace(second, weight=1.0))
    got, _ = train(data_config(*weighted, pack=False), tokenizer, batch=8, steps=4)
    names = [info.source for batch in got for row in batch.info.rows for info in row]
    assert (names.count("a"), names.count("b")) == (24, 8)


@pytest.mark.parametrize("pack", [True, False])
def test_any_number_of_processes_sees_the_same_global_batches(tmp_path, tokenizer, pack):
    data = data_config(make_set(tmp_path, "a"), make_set(tmp_path, "b", videos=5), pack=pack)
    whole, one = train(data, tokenizer, batch=4, steps=5)
    for count in (2, 4):
        shares, every = zip(
            *(
                train(data, tokenizer, batch=4, steps=5, share_index=i, share_count=count)
                for i in range(count)
            ),
            strict=True,
        )
        assert {len(share) for share in shares} == {5}
        assert {batches.fingerprint for batches in every} == {one.fingerprint}
        assert_equal(interleave(shares), whole)


def test_resumed_stream_is_the_tail_of_the_whole(tmp_path, tokenizer):
    data = data_config(make_set(tmp_path, "a"))
    whole, _ = train(data, tokenizer, steps=9)
    for start in (1, 5, 9):
        tail, batches = train(data, tokenizer, steps=9, start_step=start)
        assert_equal(tail, whole[start:])
        assert batches.steps == 0
    two = [
        train(data, tokenizer, steps=9, start_step=4, share_index=i, share_count=2)[0]
        for i in range(2)
    ]
    assert_equal(interleave(two), whole[4:])


def test_worker_processes_change_nothing(tmp_path, tokenizer):
    """Also for bad records, and where workers do not divide the rows; resumed in the middle."""
    data = data_config(make_set(tmp_path, "a"), max_bad_fraction=1.0)
    arguments = {"batch": 3, "steps": 7, "start_step": 2}
    with pipeline.train_batches(data, MODEL, tokenizer, **arguments) as batches:
        os.remove(tmp_path / "a3.mp4")
        expected = list(batches)
    write_video(str(tmp_path / "a3.mp4"), clip(5, 3))
    with_workers = dataclasses.replace(data, workers=2)
    with pipeline.train_batches(with_workers, MODEL, tokenizer, **arguments) as batches:
        os.remove(tmp_path / "a3.mp4")
        got = list(batches)
    assert len(expected) == 5
    assert any(batch.info.errors for batch in expected)
    assert_equal(got, expected)


def test_a_changed_data_set_has_another_fingerprint(tmp_path, tokenizer):
    source = make_set(tmp_path, "a")
    _, before = train(data_config(source), tokenizer, steps=1)
    _, again = train(data_config(source), tokenizer, steps=1)
    os.remove(tmp_path / "a3.mp4")
    _, after = train(data_config(source), tokenizer, steps=1)
    assert before.fingerprint == again.fingerprint != after.fingerprint


def test_processes_must_divide_the_batch(tmp_path, tokenizer):
    data = data_config(make_set(tmp_path, "a", videos=1))
    with pytest.raises(ValueError, match="a batch of 4 rows cannot be cut into 3 equal shares"):
        train(data, tokenizer, batch=4, share_count=3)
    with pytest.raises(ValueError, match="share_index=2 of 2 shares"):
        train(data, tokenizer, batch=4, share_index=2, share_count=2)


# ------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("pack", [True, False])
def test_evaluation_sees_every_record_once_in_order(tmp_path, tokenizer, pack):
    data = data_config(make_set(tmp_path, "a"), make_set(tmp_path, "b", videos=3), pack=pack)
    expected = [
        file[i].id for file in (JsonFile(s.path) for s in data.eval) for i in range(len(file))
    ]

    def evaluate(index, count):
        with pipeline.eval_batches(
            data,
            MODEL,
            tokenizer,
            batch=4,
            samples=100,
            share_index=index,
            share_count=count,
        ) as batches:
            assert batches.steps > 0
            got = list(batches)
            assert batches.steps == 0
            return got

    whole = evaluate(0, 1)
    assert sum(ids(whole), []) == expected
    shares = [evaluate(index, 2) for index in range(2)]
    assert_equal(interleave(shares), whole)
    if not pack:
        assert len(expected) == 23 and len(whole) == 6  # 24 rows, the last one empty
        assert whole[-1].info.rows[-1] == ()
        last = {name: array[-1] for name, array in whole[-1].arrays.items()}
        assert (last["segments"] == -1).all() and (last["targets"] == -1).all()
        assert (last["frame_segments"] == -1).all() and not last["frames"].any()


def test_evaluation_of_a_part(tmp_path, tokenizer):
    data = data_config(make_set(tmp_path, "a"), pack=False)

    def names():
        with pipeline.eval_batches(data, MODEL, tokenizer, batch=4, samples=6) as batches:
            return sum(ids(batches), [])

    everything = [record.id for record in JsonFile(data.eval[0].path)]
    chosen = names()
    assert len(chosen) == 6 and chosen == names()
    assert [name for name in everything if name in chosen] == chosen != everything[:6]


# ------------------------------------------------------------------------------------ bad records


def test_bad_records_known_beforehand_are_listed(tmp_path, tokenizer):
    source = make_set(tmp_path, "a")
    good = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a6.mp4").read_bytes()[:200])
    (tmp_path / "text.mp4").write_text("no video")
    bad = [
        record("missing", [("video", "gone.mp4")], "?"),
        record("cut", [("video", "cut.mp4")], "?"),
        record("nonsense", [("video", "text.mp4")], "?"),
        record("placeholder", [("video", "a0.mp4")], "?"),
        record("long", [("video", "a6.mp4")], "x" * 200),
        record("frames", [("video", "a6.mp4"), ("video", "a5.mp4")], "?"),
        record("outside", [("video", "a6.mp4")], "?"),
        record("silent", [("video", "a0.mp4")], "?"),
        record("half", [("image", "a0a.png"), ("image", "gone.png")], "?"),
    ]
    bad[3]["conversations"][0]["value"] = "no place for the video"
    bad[6]["media"][0]["start"] = 99
    bad[7]["conversations"].pop()
    mixed = tmp_path / "mixed.jsonl"
    lines = [json.dumps(r) for r in good[:3] + bad + good[3:]]
    mixed.write_text("\n".join([*lines, "{not json"]) + "\n", encoding="utf-8")

    got, batches = train(data_config(SourceConfig(str(mixed))), tokenizer)
    reasons = {record.id: record.reason for record in batches.known_bad}
    assert len(batches.known_bad) == len(reasons) == 10
    assert batches.usable == len(good)
    for name, parts in {
        "missing": ["gone.mp4"],
        "cut": ["cut.mp4"],
        "nonsense": ["text.mp4"],
        "record 6": ["no <video> placeholder", "mixed.jsonl"],
        "long": ["tokens (16 visual, ", "data.sequence_length=160"],
        "frames": ["needs 15 frames (2 media), but data.row_frames=12"],
        "outside": ["start=99"],
        "record 10": ["no answer"],
        "half": ["gone.png"],
        "record 25": ["not JSON"],
    }.items():
        for part in parts:
            assert part in reasons[name], (name, reasons[name])
    assert "a0a.png" not in reasons["half"]
    assert {record.source for record in batches.known_bad} == {"mixed"}

    # The others come as if the bad ones had never been in the file.
    assert not any(batch.info.errors for batch in got)
    clean, _ = train(data_config(source), tokenizer)
    assert ids(got) == ids(clean)
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_array_equal(a.arrays["frames"], b.arrays["frames"])


@pytest.mark.parametrize("damage", ["missing", "truncated", "another"])
def test_a_file_that_fails_later_leaves_all_other_rows_alone(tmp_path, tokenizer, damage):
    data = data_config(make_set(tmp_path, "a"))
    expected, _ = train(data, tokenizer)
    path = tmp_path / "a4.mp4"
    with pipeline.train_batches(data, MODEL, tokenizer, batch=4, steps=6) as batches:
        assert batches.known_bad == ()
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.write_text("not a video any more")
        got = list(batches)

    hit = 0
    for a, b in zip(got, expected, strict=True):
        for row in range(4):
            wanted = [info for info in b.info.rows[row] if info.id != "a-v4"]
            assert list(a.info.rows[row]) == wanted
            if len(wanted) == len(b.info.rows[row]):
                for name in a.arrays:
                    np.testing.assert_array_equal(a.arrays[name][row], b.arrays[name][row])
            else:
                hit += 1
                assert a.arrays["segments"][row].max() + 1 == len(wanted)
        for error in a.info.errors:
            assert (error.source, error.id) == ("a", "a-v4") and "a4.mp4" in error.reason
    assert hit > 0
    assert hit == sum(len(batch.info.errors) for batch in got)


def test_fewer_frames_than_planned_shrink_the_sample(tmp_path, tokenizer):
    write_video(str(tmp_path / "v.mp4"), clip(8, 0))
    source = write_records(tmp_path / "s.jsonl", [record("v", [("video", "v.mp4")], "?")])
    data = data_config(source)
    with pipeline.train_batches(data, MODEL, tokenizer, batch=1, steps=1) as batches:
        write_video(str(tmp_path / "v.mp4"), clip(3, 0))
        (batch,) = list(batches)
    assert batch.info.errors == ()
    assert batch.arrays["frame_groups"][0].tolist() == [0, 0, 1] + [-1] * 9
    assert (batch.arrays["tokens"] == VISUAL).sum() == 2 * 4


def test_a_sample_that_has_grown_does_not_take_the_room_of_another(tmp_path, tokenizer):
    """Planned are v with 5 frames, then w with 4; v turns out to have 8."""
    write_video(str(tmp_path / "w.mp4"), clip(4, 1))
    questions = [record(name, [("video", f"{name}.mp4")], "?") for name in "vw"]
    source = write_records(tmp_path / "s.jsonl", questions)
    for row_frames, got in ((11, ["w"]), (12, ["v", "w"])):
        write_video(str(tmp_path / "v.mp4"), clip(5, 0))
        data = data_config(source, row_frames=row_frames)
        with pipeline.train_batches(data, MODEL, tokenizer, batch=1, steps=1) as batches:
            write_video(str(tmp_path / "v.mp4"), clip(8, 0))
            (batch,) = list(batches)
        assert [info.id for info in batch.info.rows[0]] == got
        assert len(batch.info.errors) == 2 - len(got)
        for error in batch.info.errors:
            assert error.id == "v" and "8 frames" in error.reason and "7 frames" in error.reason


def test_too_many_bad_records_stop_the_run_at_once(tmp_path, tokenizer):
    records = [record(f"r{i}", [("video", "gone.mp4")], "?") for i in range(3)]
    source = write_records(tmp_path / "s.jsonl", records + [record("t", [], "hello")] * 17)
    with pytest.raises(DataError, match=r"3 of 20 records.*max_bad_fraction=0.1 .*\n.*r0.*gone"):
        train(data_config(source, max_bad_fraction=0.1), tokenizer)
    got, batches = train(data_config(source, max_bad_fraction=0.15), tokenizer)
    assert len(got) == 6 and len(batches.known_bad) == 3


def test_data_sets_without_a_usable_record(tmp_path, tokenizer):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="empty.jsonl has no usable record"):
        train(data_config(SourceConfig(str(empty))), tokenizer)
    with pytest.raises(DataError, match="data.train names no data set"):
        train(data_config(), tokenizer)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_time_limit_of_a_file(tmp_path, tokenizer, workers):
    write_video(str(tmp_path / "v.mp4"), clip(8, 0))
    source = write_records(
        tmp_path / "s.jsonl",
        [record("v", [("video", "v.mp4")], "?"), record("t", [], "hello")],
    )
    data = data_config(source, decode_timeout=1e-9, workers=workers, pack=False)
    got, _ = train(data, tokenizer, batch=1, steps=2)
    errors = [error for batch in got for error in batch.info.errors]
    assert [error.id for error in errors] == ["v"]
    assert "v.mp4" in errors[0].reason
    assert sum(ids(got), []) == ["t"]


# -------------------------------------------------------------------------------- reading ahead


def test_memory_budget_sets_how_much_is_read_ahead():
    clip_bytes = 128 * 448 * 448 * 3  # 77 MB
    for megabytes, local, expected in (
        (2048, 4, (1, 23)),  # 27 rows fit
        (16384, 4, (2, 64)),  # 212 would fit, but 16 batches of rows are enough
        (16, 4, (1, 1)),  # not even one row fits: the least there can be
    ):
        depths = pipeline._depths(megabytes, clip_bytes, local)
        assert (depths.batches, depths.rows) == expected
    assert pipeline._depths(2048, 60_000, 64) == pipeline._Depths(2, 1024)


def test_nothing_comes_after_the_end_or_after_close(tmp_path, tokenizer):
    data = data_config(make_set(tmp_path, "a"))
    with pipeline.train_batches(data, MODEL, tokenizer, batch=4, steps=3) as batches:
        assert batches.steps == 3
        next(batches)
        assert batches.steps == 2
        assert len(list(batches)) == 2 and batches.steps == 0
        assert list(batches) == []
    batches = pipeline.train_batches(data, MODEL, tokenizer, batch=4, steps=30)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


def test_rows_too_large_for_shared_memory(tmp_path):
    with pytest.raises(DataError, match="/dev/shm has .* 8 data workers need at least"):
        pipeline._shared_memory_rows(1 << 50, 8)


def test_configuration_is_that_of_the_run(tmp_path, tokenizer):
    """Other sizes reach the arrays: nothing here is tied to the sizes of the tests above."""
    data = data_config(make_set(tmp_path, "a"), sequence_length=300, row_frames=9)
    model = small_model(image_size=48, patch_size=16, temporal_pool=4)
    with pipeline.train_batches(data, model, tokenizer, batch=2, steps=1) as batches:
        (batch,) = list(batches)
    assert batch.arrays["frames"].shape == (2, 9, 48, 48, 3)
    assert batch.arrays["tokens"].shape == (2, 300)


# ------------------------------------------------------------------------------ what loading costs


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_process_decodes_its_own_rows_alone(tmp_path, tokenizer, monkeypatch, count):
    data = data_config(make_set(tmp_path, "a"))
    decoded = []
    real = video.sample

    def counting(medium, *arguments):
        decoded.append(os.path.basename(medium.path))
        return real(medium, *arguments)

    monkeypatch.setattr(video, "sample", counting)
    of_share = []
    for index in range(count):
        got, _ = train(data, tokenizer, steps=5, share_index=index, share_count=count)
        shown = [info.id for batch in got for row in batch.info.rows for info in row]
        media = {r["id"]: r["media"] for r in map(json.loads, open(data.train[0].path))}
        assert sorted(decoded) == sorted(m["path"] for name in shown for m in media[name])
        of_share.append(len(decoded))
        decoded.clear()
    got, _ = train(data, tokenizer, steps=5)
    assert sum(of_share) == len(decoded) > 20 and max(of_share) < len(decoded) or count == 1


def test_load_of_a_batch(tmp_path, tokenizer):
    """Frames are counted, and time is that of the threads that loaded them."""
    data = data_config(make_set(tmp_path, "a"))
    meter = LoadMeter()
    frames = 0
    for batch in train(data, tokenizer, steps=4)[0]:
        meter.add(batch.info.load)
        frames += (batch.arrays["frame_segments"] >= 0).sum()
        assert 0 < batch.info.load.cpu_seconds <= 1.01 * batch.info.load.seconds + 0.01
    total = meter._sum
    assert total.frames == frames > 50
    rates = meter.rates()
    assert rates["decode_frames_per_core_second"] == total.frames / total.cpu_seconds
    assert 0 <= rates["decode_wait_share"] < 1 and rates["decode_cores"] > 0
    assert meter.rates() == {}  # nothing since


def test_waiting_is_not_decoding(tmp_path, tokenizer, monkeypatch):
    """A slow disk shows in the share that was waited, not in what a core can do."""
    data = data_config(make_set(tmp_path, "a"), pack=False)
    real = video.sample

    def slow(*arguments):
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(video, "sample", slow)
    (batch,), _ = train(data, tokenizer, batch=2, steps=1)
    load = batch.info.load
    assert load.seconds > 0.2 and load.cpu_seconds < load.seconds / 2
