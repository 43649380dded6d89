"""Every format of a data set against the JSONL file that it was made of."""

import dataclasses
import json
import pickle
import shutil
import sys
import tarfile

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from storm_jax.config import DataConfig, FrameConfig, SourceConfig
from storm_jax.data import convert, pipeline, text, validate, video
from storm_jax.data.formats import tar
from storm_jax.data.open_records import expand, open_records
from storm_jax.data.records import Media, RecordError
from tests.data.media_files import write
from tests.data.record_files import make_set, record, write_records, write_tar
from tests.data.small_model import small_model

MODEL = small_model(image_size=32, patch_size=16)
FORMATS = (
    "array_record",
    "array_record_paths",
    "tar",
    "tar_paths",
    "parquet",
    "tfds",
    "tfds_paths",
    "mixture",
)


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer("bytes")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """15 records; one of them shows a part of a video that another one shows whole."""
    folder = tmp_path_factory.mktemp("plain")
    source = make_set(folder, "a", videos=10)
    part = record("part", [("video", "a6.mp4")], "and here?")
    part["media"][0] |= {"start": 0.25, "end": 0.75}
    with open(source.path, "a") as file:
        file.write(json.dumps(part) + "\n")
    return source


@pytest.fixture(scope="module")
def made(plain, tmp_path_factory):
    """`made(format)` is the source of the same records in that format; made once."""
    folder = tmp_path_factory.mktemp("made")
    root = plain.path.rpartition("/")[0]
    done = {}

    def make(kind):
        if kind not in done:
            done[kind] = _make(kind, plain, folder / kind, root)
        return done[kind]

    return make


def _make(kind, plain, folder, root):
    if kind.startswith(("array_record", "tar")):
        ending = kind.removesuffix("_paths")
        options = ["--paths"] if kind.endswith("_paths") else []
        out = str(folder / f"a.{ending}")
        convert.write_shards(
            open_records(plain), out, with_media=not options, shard_bytes=600 if options else 8000
        )
        files = expand(str(folder / f"a-*.{ending}"))
        assert len(files) > 2
        return SourceConfig(str(folder / f"a-*.{ending}"), root if options else "")
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        return _parquet(plain, folder, root)
    if kind == "mixture":
        (folder / "mix.yaml").write_text(f"datasets:\n  - json_path: {plain.path}\n")
        return SourceConfig(str(folder / "mix.yaml"))
    builder = pytest.importorskip("storm_jax.data.tfds_builder")
    options = ["--paths"] if kind.endswith("_paths") else []
    assert builder.main([f"--data_dir={folder}", f"--train={plain.path}", *options]) == 0
    return SourceConfig(str(folder / "llava_video" / "1.0.0"), root)


def _parquet(plain, folder, root):
    """As Hugging Face writes it: one struct for a video, a list of structs for images."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = []
    for line in open(plain.path):
        raw = json.loads(line)
        row = {key: raw.get(key) for key in ("id", "task", "conversations")}
        row |= {"video": None, "images": [], "start": None, "end": None}
        for medium in raw["media"]:
            packed = {"bytes": open(f"{root}/{medium['path']}", "rb").read(), "path": None}
            if medium["path"] == "a2.mp4":  # one lies beside the file
                packed = {"bytes": None, "path": medium["path"]}
            if medium["type"] == "image":
                row["images"].append(packed)
            else:
                row |= {"video": packed, "start": medium.get("start"), "end": medium.get("end")}
        rows.append(row)
    for number, part in enumerate((rows[:5], rows[5:])):
        name = folder / f"train-{number:05d}-of-00002.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(part), name, row_group_size=3)
    return SourceConfig(str(folder / "train-*.parquet"), root)


def data_config(*train, **changes):
    settings = DataConfig(
        train=train,
        eval=train,
        frames=FrameConfig(max_frames=8),
        tokenizer="bytes",
        chat_template="gemma",
        sequence_length=160,
        row_frames=12,
        pack=True,
        max_bad_fraction=0.5,
    )
    return dataclasses.replace(settings, **changes)


def load(data, tokenizer, steps=5, **arguments):
    with pipeline.train_batches(
        data, MODEL, tokenizer, batch=2, steps=steps, **arguments
    ) as batches:
        assert batches.known_bad == ()
        return list(batches), batches.fingerprint


def assert_equal(got, expected, names=True):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert [[s.id for s in row] for row in a.info.rows] == [
            [s.id for s in row] for row in b.info.rows
        ]
        assert a.info.errors == b.info.errors == ()
        assert a.info.load.frames == b.info.load.frames
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name], strict=True)


# -------------------------------------------------------------------------------- the same samples


@pytest.mark.parametrize("kind", FORMATS)
def test_same_samples_as_from_jsonl(plain, made, tokenizer, kind):
    source = made(kind)
    expected, fingerprint = load(data_config(plain), tokenizer)
    got, its = load(data_config(source), tokenizer)
    assert its == fingerprint
    assert_equal(got, expected)
    assert sum(batch.info.load.frames for batch in got) > 50
    # again from the caches, and in the middle
    tail, _ = load(data_config(source), tokenizer, start_step=3)
    assert_equal(tail, expected[3:])


@pytest.mark.parametrize("kind", FORMATS)
def test_records_are_equal(plain, made, kind):
    (ours,) = open_records(plain)
    (part,) = open_records(made(kind))
    records = pickle.loads(pickle.dumps(part.records))
    assert len(records) == len(part.chosen) == 15
    for number in (14, 0, 3, 9, 10, 12):
        record, expected = records[number], ours.records[number]
        assert (record.id, record.turns, record.task) == (
            expected.id,
            expected.turns,
            expected.task,
        )
        for medium, other in zip(record.media, expected.media, strict=True):
            assert medium.data is None  # contents are read when they are asked for
            assert (medium.kind, medium.start, medium.end) == (other.kind, other.start, other.end)
            opened = records.opened(medium)
            data = opened.data
            if data is None:
                data = open(opened.path, "rb").read()
            elif not isinstance(data, bytes):
                data = data.read()
            assert data == open(other.path, "rb").read()
    with pytest.raises(IndexError):
        records[15]


@pytest.mark.slow
def test_workers_read_every_format(plain, made, tokenizer):
    """All formats in one mixture, in two worker processes, resumed in the middle."""
    sources = [plain, *map(made, FORMATS)]
    expected, _ = load(data_config(*sources), tokenizer, steps=12, start_step=4)
    got, _ = load(data_config(*sources, workers=2), tokenizer, steps=12, start_step=4)
    assert_equal(got, expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_validate(made, capsys, kind):
    source = made(kind)
    arguments = [source.path, f"--media_root={source.media_root}", "--decode"]
    assert validate.main(arguments) == 0
    out = capsys.readouterr().out
    assert "15 records, 0 bad" in out
    assert "video 10, image 4" in out or "video 11, image 4" in out  # a copy for each record


def test_long_videos_in_tars_are_not_read_as_a_whole(tmp_path, monkeypatch):
    """A frame at the front costs the header and that part of the file alone."""
    clip = write(tmp_path / "v.mp4", 150, size=(320, 240), options={"g": "10", "qp": "1"})
    write_records(tmp_path / "s.jsonl", [record("v", [("video", "v.mp4")], "?")])
    source = SourceConfig(str(tmp_path / "s.jsonl"))
    convert.write_shards(
        open_records(source), str(tmp_path / "s.tar"), with_media=True, shard_bytes=1 << 30
    )
    (part,) = open_records(SourceConfig(str(tmp_path / "s-*.tar")))
    medium = part.records.opened(part.records[0].media[0])
    read = []
    real = tar._Member.readinto

    def counting(self, buffer):
        read.append(real(self, buffer))
        return read[-1]

    monkeypatch.setattr(tar._Member, "readinto", counting)
    found = video.probe(medium.path, "video", medium.data)
    assert found == video.probe(str(clip))
    early = dataclasses.replace(medium, end=0.5)
    frames, times = video.sample(early, FrameConfig(max_frames=4), 32)
    expected = video.sample(Media("video", str(clip), None, 0.5), FrameConfig(max_frames=4), 32)
    np.testing.assert_array_equal(frames, expected[0])
    np.testing.assert_array_equal(times, expected[1])
    assert 0 < sum(read) < clip.stat().st_size // 2  # of which the header, three times


def test_planning_reads_no_media_of_parquet(made):
    (part,) = open_records(made("parquet"))
    for number in range(len(part.records)):
        part.records[number]
    assert {contents for _, _, contents in part.records._tables} == {False}
    for table in part.records._tables.values():
        assert "bytes" not in str(table.schema)


def test_index_of_a_tar_is_kept_and_follows_thewrite_tar(plain, tmp_path, monkeypatch):
    scanned = []
    real = tar._scan
    monkeypatch.setattr(tar, "_scan", lambda file: scanned.append(file) or real(file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    convert.write_shards(
        open_records(plain), str(folder / "a.tar"), with_media=True, shard_bytes=1 << 30
    )
    source = SourceConfig(str(folder / "a-00000.tar"))
    for _ in range(2):
        (part,) = open_records(source)
        assert len(part.records) == 15 and len(scanned) == 1
    assert (folder / "a-00000.tar.index.npz").exists()
    (folder / "a-00000.tar.index.npz").write_bytes(b"damaged")
    open_records(source)
    assert len(scanned) == 2
    write_tar(folder / "a-00000.tar", {"x.json": json.dumps(record("x", [], "?"))})
    (part,) = open_records(source)
    assert len(part.records) == 1 and part.records[0].id == "x" and len(scanned) == 3
    # where the folder cannot be written (permissions do not stop root)
    (folder / "a-00000.tar.index.npz").unlink()
    (folder / "a-00000.tar.index.npz").mkdir()
    for _ in range(2):
        open_records(source)
    assert len(scanned) == 4


# ------------------------------------------------------------------------------------- the mixture


def write_mixture(path, *entries):
    path.write_text(json.dumps({"datasets": entries}))  # JSON is YAML
    return SourceConfig(str(path))


def test_sampling_strategies(plain, tmp_path):
    def chosen(strategy, seed=0):
        entry = {"json_path": plain.path, "sampling_strategy": strategy}
        (part,) = open_records(write_mixture(tmp_path / "m.yaml", entry), seed)
        return part.chosen.tolist()

    assert chosen("all") == list(range(15))
    assert chosen("first:4") == [0, 1, 2, 3]
    assert chosen("first:10%") == [0, 1]  # a share is rounded up
    assert chosen("end:3") == [12, 13, 14]
    assert chosen("first:99") == list(range(15))
    drawn = chosen("random:40%")
    assert len(drawn) == 6 and drawn == chosen("random:40%") == sorted(drawn)
    assert drawn != chosen("random:40%", seed=1) and drawn != list(range(6))


def test_a_mixture_is_one_source_of_several_sets(plain, made, tmp_path, tokenizer):
    """Its records come as often as those of a file that holds them all would."""
    lines = open(plain.path).read().splitlines(keepends=True)
    shutil.copytree(plain.path.rpartition("/")[0], tmp_path / "media")
    (tmp_path / "b.jsonl").write_text("".join(lines[:4]))
    (tmp_path / "c.jsonl").write_text("".join(lines[4:7]))
    mixture = write_mixture(
        tmp_path / "mix.yaml",
        {"json_path": "{b,c}.jsonl", "sampling_strategy": "first:6", "data_root": "media"},
        {"json_path": made("tar").path, "sampling_strategy": "end:4", "video_read_type": "decord"},
    )
    (tmp_path / "one.jsonl").write_text("".join(lines[:6] + lines[11:]))
    one = SourceConfig(str(tmp_path / "one.jsonl"), str(tmp_path / "media"))
    expected, fingerprint = load(data_config(one, pack=False), tokenizer, steps=10)
    got, _ = load(data_config(mixture, pack=False), tokenizer, steps=10)
    assert_equal(got, expected)
    # What is not chosen is not looked at.
    probed = [json.loads(line)["path"] for line in open(tmp_path / "c.jsonl.probe.jsonl")]
    assert probed == ["a4.mp4", "a5.mp4"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("datasets: [", "is not YAML"),
        ("sets: []", 'needs a list "datasets"'),
        ("datasets:\n  - a.jsonl", "entry 0 is 'a.jsonl', not an object with json_path"),
        ("datasets:\n  - path: a.jsonl", "has path; known keys are json_path, sampling_strategy"),
        ("datasets:\n  - sampling_strategy: all", "json_path=None must be a path"),
        ("datasets:\n  - {json_path: a.jsonl, sampling_strategy: half}", "='half' is not underst"),
        ("datasets:\n  - {json_path: b.yaml}", "b.yaml is a mixture itself"),
    ],
)
def test_mistakes_in_a_mixture(tmp_path, content, message):
    (tmp_path / "m.yaml").write_text(content)
    with pytest.raises(RecordError, match="m.yaml.*" + message):
        open_records(SourceConfig(str(tmp_path / "m.yaml")))


def test_braces_and_wildcards(tmp_path):
    for name in ("a-00.tar", "a-01.tar", "b-07.tar"):
        (tmp_path / name).touch()
    names = [path.rpartition("/")[2] for path in expand(f"{tmp_path}/{{b,a}}-*.tar")]
    assert names == ["b-07.tar", "a-00.tar", "a-01.tar"]
    assert expand("x/{08..11}.tar") == ("x/08.tar", "x/09.tar", "x/10.tar", "x/11.tar")
    with pytest.raises(RecordError, match=r"c-\*.tar matches no file"):
        expand(f"{tmp_path}/c-*.tar")


# --------------------------------------------------------------------------------------- bad input


def test_files_of_no_known_format(tmp_path):
    with pytest.raises(RecordError, match="a.txt: its ending says no format; known are .json,"):
        open_records(SourceConfig("a.txt"))
    with pytest.raises(RecordError, match="is a folder without dataset_info.json"):
        open_records(SourceConfig(str(tmp_path)))
    (tmp_path / "a.txt").write_text(json.dumps(record("a", [], "?")))
    (part,) = open_records(SourceConfig(str(tmp_path / "a.txt"), format="json"))
    assert part.records[0].id == "a"


@pytest.mark.parametrize("ending", ["array_record", "tar", "parquet"])
def test_missing_and_damaged_files(made, tmp_path, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"x.{ending}"
    with pytest.raises(RecordError, match=f"x.{ending}: .*(No such file|Failed to open)"):
        open_records(SourceConfig(str(path)))
    path.write_text("no such thing" * 10_000)
    with pytest.raises(RecordError, match=f"x.{ending}: not a complete"):
        open_records(SourceConfig(str(path)))
    whole = open(expand(made(ending).path)[0], "rb").read()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match=f"x.{ending}: not a complete"):
        open_records(SourceConfig(str(path)))


def bad_records(source, capsys):
    assert validate.main([source.path, f"--media_root={source.media_root}"]) == 1
    return capsys.readouterr().out


def test_bad_records_of_array_record(plain, tmp_path, capsys):
    path = str(tmp_path / "x.array_record")
    video_bytes = open(plain.path.replace("a.jsonl", "a5.mp4"), "rb").read()

    def clip(data, name):
        raw = record(name, [("video", "v.mp4")], "?")
        raw["media"][0]["bytes"] = data
        return msgpack.packb(raw)

    writer = ArrayRecordWriter(path, "group_size:1")
    for packed in (
        clip(video_bytes, "good"),
        b"\xc1",
        b"{broken",
        msgpack.packb([1]),
        clip(b"no video", "nonsense"),
        clip(video_bytes[:300], "cut"),
        clip(b"", "empty"),
    ):
        writer.write(packed)
    writer.close()
    out = bad_records(SourceConfig(path), capsys)
    assert "7 records, 6 bad" in out
    for expected in (
        f"{path}: record 1 is neither JSON nor MessagePack",
        f"{path}: record 2 is neither JSON nor MessagePack",
        f"{path}: record 3 is a list, not an object with fields",
        f"record 4 (id nonsense): {path}#4/0.mp4: cannot be opened: Invalid data",
        f"record 5 (id cut): {path}#5/0.mp4: cannot be opened",
        f"record 6 (id empty): {path}#6/0.mp4: is empty",
    ):
        assert expected in out


def test_bad_records_of_tars(tmp_path, capsys):
    said = json.dumps(record("", [], "<video>?"))
    path = write_tar(
        tmp_path / "x.tar",
        {
            "0.json": json.dumps(record("good", [], "?")),
            "1.mp4": b"alone",
            "2.json": "{broken",
            "3.json": "[1]",
            "4.json": said,
            "4.mp4": b"nonsense",
            "5.json": said,
        },
    )
    out = bad_records(SourceConfig(str(path)), capsys)
    assert "6 records, 5 bad" in out
    for expected in (
        f"{path}: record 1 (1) has 0 .json members; a sample needs one",
        f"{path}: record 2 (2) is not JSON",
        f"{path}: record 3 is a list, not an object",
        f"record 4 (id 4): {path}#4.mp4: cannot be opened: Invalid data",
        f"{path}: record 5 (id 5): 1 placeholders but 0 media",
    ):
        assert expected in out
    write_tar(tmp_path / "y.tar", {"0.mp4": b"x"})
    with pytest.raises(RecordError, match="y.tar: none of its 1 members is a record: .*KEY.json"):
        open_records(SourceConfig(str(tmp_path / "y.tar")))
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as out:
        out.add(path, "x")
    with pytest.raises(RecordError, match="z.tar.gz: not a complete tar.*decompress it"):
        open_records(SourceConfig(str(tmp_path / "z.tar.gz"), format="webdataset"))


def test_parquet_without_conversations_and_without_pyarrow(tmp_path, monkeypatch, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = str(tmp_path / "x.parquet")
    parquet.write_table(pyarrow.table({"id": ["a"], "video": [b"x"]}), path)
    with pytest.raises(RecordError, match="has no column conversations or .*it has id, video"):
        open_records(SourceConfig(path))
    good = json.dumps(record("", [], "?")["conversations"])
    table = pyarrow.table({"id": ["a", "b", "c"], "messages": [good, "{", None]})
    parquet.write_table(table, path)
    out = bad_records(SourceConfig(path), capsys)
    assert "3 records, 2 bad" in out
    assert f"{path}: record 1 has messages that are not JSON" in out
    assert f"{path}: record 2 (id c): has no conversation" in out
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RecordError, match=r"parquet files need pyarrow; pip install 'storm_jax\[p"):
        open_records(SourceConfig(path))


def test_tfds_that_cannot_be_read(made, tmp_path, monkeypatch):
    good = made("tfds")
    for split in ("test", "train[:50%]"):  # caches would take a part for the whole
        with pytest.raises(RecordError, match="1.0.0, split t.*: the data set has train; for a pa"):
            open_records(dataclasses.replace(good, split=split))
    other = tmp_path / "1.0.0"
    shutil.copytree(good.path, other)
    (other / "features.json").write_text("{")
    with pytest.raises(RecordError, match="1.0.0, split train: "):
        open_records(SourceConfig(str(other)))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(RecordError, match=r"tensorflow-datasets; pip install 'storm_jax\[tfds\]'"):
        open_records(good)


@pytest.mark.parametrize("kind", ["array_record", "parquet", "tfds"])
def test_conversion_out_of_other_formats(plain, made, tmp_path, capsys, kind):
    """To a tar; but media inside files have no paths that could be kept."""
    source = made(kind)
    root = f"--media_root={source.media_root}"
    assert convert.main([source.path, str(tmp_path / "b.tar"), root]) == 0
    (ours,) = open_records(plain)
    (part,) = open_records(SourceConfig(str(tmp_path / "b-00000.tar")))
    assert len(part.records) == 15
    for number in range(15):
        its, expected = part.records[number], ours.records[number]
        assert (its.id, its.turns, its.task) == (expected.id, expected.turns, expected.task)
        for medium, other in zip(its.media, expected.media, strict=True):
            assert (medium.start, medium.end) == (other.start, other.end)
            assert part.records.opened(medium).data.read() == open(other.path, "rb").read()
            if kind != "parquet":  # it has no names
                assert medium.path.rpartition(".")[2] == other.path.rpartition(".")[2]
    assert convert.main([str(tmp_path / "b-00000.tar"), str(tmp_path / "c.tar"), "--paths"]) == 1
    assert "lies inside a file: --paths cannot keep it there" in capsys.readouterr().err


def test_conversion_lists_what_it_leaves_out(plain, tmp_path, capsys):
    (tmp_path / "frames").mkdir()
    records = [
        record("t", [], "hello"),
        record("gone", [("video", "gone.mp4")], "?"),
        record("folder", [("video", "frames")], "?"),
    ]
    source = write_records(tmp_path / "s.jsonl", records)
    out = str(tmp_path / "s.array_record")
    assert convert.main([source.path, out]) == 1
    said = capsys.readouterr()
    assert "1 files" in said.out and "gone.mp4 cannot be read: No such file" in said.err
    assert "frames is a folder of frames: only --paths can keep it" in said.err
    assert convert.main([source.path, out]) == 1
    assert "s-00000.array_record is there already" in capsys.readouterr().err
    assert convert.main([source.path, str(tmp_path / "s.zip")]) == 1
    assert "s.zip must end in .array_record or .tar" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind", ["array_record", "tar", "parquet", "tfds"])
def test_a_damaged_medium_costs_its_sample_alone(made, tokenizer, monkeypatch, kind):
    """The time limit and the reports are those of files."""
    data = data_config(made(kind), decode_timeout=1e-9, pack=False)
    with pipeline.train_batches(data, MODEL, tokenizer, batch=1, steps=15) as batches:
        got = list(batches)
    errors = {error.id: error.reason for batch in got for error in batch.info.errors}
    assert len(errors) == 11  # all videos; images have no limit
    for reason in errors.values():
        assert "#" in reason or "a2.mp4" in reason
        assert "took longer than 1e-09 s" in reason or "cannot be opened" in reason
