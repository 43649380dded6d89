import json
import os
import pickle
import shutil

import pytest

from storm_jax.data import probes
from storm_jax.data.formats.json_file import JsonFile
from storm_jax.data.probes import load_or_probe, table_path
from storm_jax.data.records import Media
from storm_jax.data.validate import main
from storm_jax.data.video import MediaError
from tests.data.media_files import write

QA = [{"from": "human", "value": "<video>\nQ"}, {"from": "gpt", "value": "A"}]


@pytest.fixture
def data(tmp_path):
    """Eight records: good, good (same video), clip outside, missing, cut off, not a video,
    without placeholder, and an image."""
    folder = tmp_path / "media" / "sub"
    folder.mkdir(parents=True)
    write(folder / "good.mp4", 30, options={"g": "10"})
    whole = write(folder / "cut.mp4", 90, container={"movflags": "faststart"}).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("text")
    write(folder / "image.png", 1, codec="png", format="image2", pix_fmt="rgb24")
    good = {"type": "video", "path": "sub/good.mp4"}
    records = [
        {"id": "a", "task": "what", "media": [good], "conversations": QA},
        {"id": "b", "task": "what", "media": [good | {"end": 0.5}], "conversations": QA},
        {"id": "c", "media": [good | {"start": 7}], "conversations": QA},
        {"id": "d", "video": "sub/none.mp4", "conversations": QA},
        {"id": "e", "video": "sub/cut.mp4", "conversations": QA},
        {"id": "f", "video": "sub/text.mp4", "conversations": QA},
        {
            "id": "g",
            "video": "sub/good.mp4",
            "conversations": [{"from": "human", "value": "Q"}, QA[1]],
        },
        {"id": "h", "image": "sub/image.png", "conversations": QA},
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path, str(tmp_path / "media")


def test_summary_names_every_bad_record(data, capsys):
    path, root = data
    assert main([str(path), f"--media_root={root}"]) == 1
    out = capsys.readouterr().out
    assert "8 records, 4 bad" in out
    assert "media       5: video 2, image 1, unreadable 2" in out
    assert "codec       h264 2" in out and "size        64x48 2" in out
    assert "source      set 4" in out and "task        what 2" in out
    for expected in (
        f"record 2 (id c): {root}/sub/good.mp4: start=7 s is outside the video: the clip",
        f"record 3 (id d): {root}/sub/none.mp4: cannot be opened: No such file or directory",
        f"record 5 (id f): {root}/sub/text.mp4: cannot be opened: Invalid data found",
        "record 6 (id g): no <video> placeholder for sub/good.mp4",
    ):
        assert f"  {path}: {expected}" in out
    assert "cut.mp4" not in out  # its header and first frame are intact

    assert main([str(path), f"--media_root={root}", "--decode"]) == 1
    out = capsys.readouterr().out
    assert "8 records, 5 bad" in out
    assert f"record 4 (id e): {root}/sub/cut.mp4: " in out
    # What decoding found stays known to those who only read the table.
    with pytest.raises(MediaError, match="cut.mp4"):
        load_or_probe(JsonFile(str(path), root))[Media("video", f"{root}/sub/cut.mp4")]


def test_good_data_set_exits_with_zero(data, capsys):
    path, root = data
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]))
    assert main([str(path), f"--media_root={root}"]) == 0
    assert "2 records, 0 bad" in capsys.readouterr().out
    assert main([str(path.with_name("none.jsonl"))]) == 1
    assert "No such file" in capsys.readouterr().err


def test_side_table_on_disk(data):
    path, root = data
    load_or_probe(JsonFile(str(path), root))
    lines = [json.loads(x) for x in open(str(path) + ".probe.jsonl")]
    by_path = {line["path"]: line for line in lines}
    assert set(by_path) == {"sub/good.mp4", "sub/cut.mp4", "sub/text.mp4", "sub/image.png"}
    good = by_path["sub/good.mp4"]
    assert good["size"] == os.path.getsize(f"{root}/sub/good.mp4") and good["kind"] == "video"
    assert good["probe"] == {
        "kind": "video",
        "duration": 1.0,
        "fps": 30.0,
        "frames": 30,
        "codec": "h264",
        "width": 64,
        "height": 48,
        "rotation": 0,
    }
    assert "Invalid data" in by_path["sub/text.mp4"]["error"]


def test_only_new_and_changed_files_are_probed(data, monkeypatch):
    path, root = data
    records = JsonFile(str(path), root)
    probed = []
    real = probes.probe

    def counting(file, kind, data):
        probed.append(os.path.basename(file))
        return real(file, kind, data)

    monkeypatch.setattr(probes, "probe", counting)
    first = load_or_probe(records)
    assert sorted(probed) == ["cut.mp4", "good.mp4", "image.png", "none.mp4", "text.mp4"]
    probed.clear()
    again = load_or_probe(records)
    assert probed == ["none.mp4"]  # a missing file is looked for each time
    good = Media("video", f"{root}/sub/good.mp4")
    assert again[good] == first[good]
    probed.clear()
    shutil.copy(good.path, f"{root}/sub/none.mp4")
    write(tmp := path.parent / "media/sub/good.mp4", 60, options={"g": "10"})
    assert load_or_probe(records)[Media("video", str(tmp))].frames == 60
    assert sorted(probed) == ["good.mp4", "none.mp4"]
    probed.clear()
    table = load_or_probe(records)
    assert probed == [] and table[Media("video", f"{root}/sub/none.mp4")].frames == 30


def test_lookup(data):
    path, root = data
    table = pickle.loads(pickle.dumps(load_or_probe(JsonFile(str(path), root))))
    assert len(table) == 5
    assert table[Media("video", f"{root}/sub/good.mp4", 0.2, 0.4)].frames == 30
    assert table[Media("image", f"{root}/sub/image.png")].kind == "image"
    with pytest.raises(MediaError, match="No such file") as error:
        table[Media("video", f"{root}/sub/none.mp4")]
    assert error.value.path == f"{root}/sub/none.mp4"
    with pytest.raises(KeyError):
        table[Media("video", "other.mp4")]


def test_damaged_table_is_made_anew(data):
    path, root = data
    records = JsonFile(str(path), root)
    load_or_probe(records)
    target = table_path(records)
    lines = open(target).read().splitlines()
    with open(target, "w") as file:
        file.write("\n".join(line[: len(line) // 2] for line in lines) + '\n{"path": 3}\n')
    assert load_or_probe(records)[Media("video", f"{root}/sub/good.mp4")].frames == 30
    assert len([json.loads(x) for x in open(target)]) == 4


def test_table_that_cannot_be_written(data, monkeypatch):
    path, root = data

    def no_room(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probes.os, "replace", no_room)
    records = JsonFile(str(path), root)
    with pytest.warns(UserWarning, match="set.jsonl.probe.jsonl: No space left on device"):
        table = load_or_probe(records)
    assert table[Media("video", f"{root}/sub/good.mp4")].frames == 30
    assert sorted(os.listdir(path.parent)) == ["media", "set.jsonl"]
