"""Workdirs: what cannot be written is told before training, and files are whole or not there."""

import importlib.util
from pathlib import Path

import pytest

from storm_jax.config import ConfigError
from storm_jax.workdir import Workdir, location, replace_text


def test_buckets_keep_their_names():
    assert str(location("gs://bucket/a/b")) == "gs://bucket/a/b"
    assert str(location("gs://bucket/a") / "checkpoints" / "3") == "gs://bucket/a/checkpoints/3"
    assert Path(location("a/b")) == Path.cwd() / "a" / "b"
    assert Path(location("~/a")) == Path.home() / "a"


def test_a_folder(tmp_path):
    folder = Workdir(str(tmp_path / "new" / "run"))
    assert folder.local == tmp_path / "new" / "run" and not list(folder.local.iterdir())
    folder.write("config.json", "{}")
    folder.close()
    assert [path.name for path in folder.local.iterdir()] == ["config.json"]


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\); give a folder"):
        Workdir(str(tmp_path / "file" / "run"))


def test_buckets_that_orbax_does_not_know():
    with pytest.raises(ConfigError, match="s3://bucket/x: Orbax writes to folders and to gs://"):
        Workdir("s3://bucket/x")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_bucket_without_its_package():
    with pytest.raises(
        ConfigError, match="gs://bucket/x needs the package gcsfs: pip install 'storm_jax"
    ):
        Workdir("gs://bucket/x")


def test_replaced_text_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("old")
    replace_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
