"""Only what lies under an allowed folder can be opened."""

import os

import pytest

from storm_jax.serving.errors import ApiError
from storm_jax.serving.local_files import LocalFiles


@pytest.fixture
def tree(tmp_path):
    """allowed/a.mp4, allowed/in/b.mp4, links in both directions, and secret.mp4 beside it."""
    allowed = tmp_path / "allowed"
    (allowed / "in").mkdir(parents=True)
    (allowed / "a b.mp4").write_bytes(b"a")
    (allowed / "in" / "b.mp4").write_bytes(b"b")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "allowed_not").mkdir()
    (tmp_path / "allowed_not" / "c.mp4").write_bytes(b"c")
    (allowed / "inner.mp4").symlink_to(allowed / "in" / "b.mp4")
    (allowed / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (allowed / "up").symlink_to(tmp_path)
    os.mkfifo(allowed / "pipe.mp4")
    return tmp_path


def opened(tree, path: str, folders=("allowed",)) -> bytes:
    files = LocalFiles([str(tree / folder) for folder in folders])
    with files.open(f"file://{tree}/{path}", "here") as file:
        return file.read()


def test_allowed(tree):
    assert opened(tree, "allowed/a%20b.mp4") == b"a"
    assert opened(tree, "allowed/in/b.mp4") == b"b"
    assert opened(tree, "allowed/in/../a b.mp4") == b"a"
    assert opened(tree, "allowed/inner.mp4") == b"b"  # a link that stays inside
    assert opened(tree, "allowed_not/c.mp4", ("allowed", "allowed_not")) == b"c"
    assert opened(tree, "allowed/up/allowed/a b.mp4") == b"a"  # ends inside
    (tree / "link").symlink_to(tree / "allowed")
    assert opened(tree, "link/a b.mp4", ("link",)) == b"a"


@pytest.mark.parametrize(
    "path",
    [
        "secret.mp4",
        "none.mp4",  # whether it exists is not told
        "allowed/../secret.mp4",
        "allowed/%2e%2e/secret.mp4",
        "allowed/in/../../secret.mp4",
        "allowed/..%2fsecret.mp4",
        "allowed/out.mp4",
        "allowed/up/secret.mp4",
        "allowed_not/c.mp4",
        "../../../../etc/passwd",
    ],
)
def test_outside(tree, path):
    with pytest.raises(ApiError) as caught:
        opened(tree, path)
    assert (caught.value.status, caught.value.code) == (403, "file_not_allowed")
    assert str(tree) not in caught.value.message


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("file:///{}/allowed/pipe.mp4", 400),  # nobody writes to it: opening must not wait
        ("file:///{}/allowed/in", 400),
        ("file:///{}/allowed/none.mp4", 404),
        ("file:///{}/allowed/a b.mp4/x", 404),
        ("file://host/{}/allowed/in/b.mp4", 400),
        ("file:{}/allowed/in/b.mp4?x", 400),
        ("file:///{}/allowed/in/b.mp4%00.png", 400),
        ("file:relative.mp4", 400),
        ("FILE:///etc/passwd", 403),
        ("file:///", 403),
    ],
)
def test_no_files(tree, url, status):
    files = LocalFiles([str(tree / "allowed")])
    with pytest.raises(ApiError) as caught:
        files.open(url.format(str(tree).strip("/")), "here")
    assert caught.value.status == status


def test_nothing_is_allowed_by_default(tree):
    with pytest.raises(ApiError) as caught:
        opened(tree, "allowed/a b.mp4", ())
    assert caught.value.status == 403


def test_a_link_put_there_after_the_check(tree, monkeypatch):
    """The path is resolved, then a folder of it becomes a link that leads out."""
    files = LocalFiles([str(tree / "allowed")])
    resolve = files.resolve

    def resolve_then_swap(url, where):
        path = resolve(url, where)
        (tree / "allowed" / "in" / "b.mp4").unlink()
        (tree / "allowed" / "in").rmdir()
        (tree / "allowed" / "in").symlink_to(tree / "allowed_not")
        return path

    monkeypatch.setattr(files, "resolve", resolve_then_swap)
    (tree / "allowed_not" / "b.mp4").write_bytes(b"secret")
    with pytest.raises(ApiError) as caught:
        files.open(f"file://{tree}/allowed/in/b.mp4", "here")
    assert caught.value.status == 404
