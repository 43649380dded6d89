"""Frames from worker processes are those of `data.video.sample`, and nothing stays behind."""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from storm_jax.data.conversation import Media
from storm_jax.data.video import MediaError, sample
from storm_jax.frames import FrameConfig
from storm_jax.inference import media as media_module
from storm_jax.inference.media import Decoders
from tests.data.media_files import cut_edit_list, read_numbers, write
from tests.data.test_video import COUNT, FILES

ROOT = Path(__file__).parents[2]
SIZE = 40
NAMES = (
    "h264.mp4",
    "variable_rate.mp4",
    "edit_list.mp4",
    "open_gop.ts",
    "intra_refresh.ts",
    "vp9.webm",
    "hevc.mp4",
    "mpeg4_bframes.avi",
    "rotated.mp4",
    "one_frame.mp4",
)
POLICIES = (
    FrameConfig(9),
    FrameConfig(10_000),
    FrameConfig(50, fps=7.0),
    FrameConfig(30, keyframes_only=True),
)


@pytest.fixture(scope="module")
def decoders():
    with Decoders(3) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def video(folder):
    """120 frames in 4 s, a key frame every 25."""
    return str(write(folder / "video.mp4", COUNT, **FILES["h264.mp4"]))


def gone(pids, seconds=5.0):
    """Whether all these processes end within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("name", NAMES)
def test_same_frames_as_sample(decoders, folder, name):
    path = write(folder / name, **({"count": COUNT} | FILES[name]))
    if name == "edit_list.mp4":
        cut_edit_list(path, media_time=3700 * 4 + 200, seconds=2.5)
    for policy in POLICIES:
        for start, end in ((None, None), (0.7, 2.2)):
            media = Media("video", str(path), start, end)
            try:
                expected = sample(media, policy, SIZE)[0]
            except MediaError as error:
                with pytest.raises(MediaError) as raised:
                    list(decoders.sample(media, policy, SIZE))
                assert str(raised.value) == str(error)
                continue
            # Small chunks: every file is shared by several workers.
            frames = decoders.sample(media, policy, SIZE, timeout=30.0, chunk=4)
            chunks = list(frames)
            assert frames.count == len(expected)
            assert all(0 < len(x) <= 4 and x.dtype == np.uint8 for x in chunks)
            np.testing.assert_array_equal(np.concatenate(chunks), expected)


def test_folders_and_images(decoders, tmp_path):
    for i in range(12):
        write(
            tmp_path / f"{i}.png", 1, codec="png", format="image2", pix_fmt="rgb24", number=i,
        )  # fmt: skip
    media = Media("video", str(tmp_path), 2.0)
    frames = np.concatenate(list(decoders.sample(media, FrameConfig(7), 48, chunk=2)))
    np.testing.assert_array_equal(frames, sample(media, FrameConfig(7), 48)[0])
    image = Media("image", str(tmp_path / "3.png"))
    (only,) = decoders.sample(image, FrameConfig(7), 48)
    np.testing.assert_array_equal(only, sample(image, FrameConfig(7), 48)[0])
    assert read_numbers(only) == [3]


def test_bytes_and_open_files(decoders, video):
    expected = sample(Media("video", video), FrameConfig(10), SIZE)[0]
    with open(video, "rb") as file:
        file.seek(100)
        for data in (Path(video).read_bytes(), file):
            media = Media("video", "upload", data=data)
            chunks = list(decoders.sample(media, FrameConfig(10), SIZE, chunk=2))
            np.testing.assert_array_equal(np.concatenate(chunks), expected)
    with pytest.raises(MediaError, match="upload: cannot be opened"):
        list(decoders.sample(Media("video", "upload", data=b"none"), FrameConfig(10), SIZE))


def test_several_media_in_any_order(decoders, video):
    """What nobody takes holds up nobody: workers never wait for whoever takes the frames."""
    spans = [(i / 4, i / 4 + 1) for i in range(8)]
    media = [Media("video", video, *span) for span in spans]
    started = [decoders.sample(m, FrameConfig(20), SIZE, chunk=2) for m in media]
    for m, frames in reversed(list(zip(media, started, strict=True))):
        expected = sample(m, FrameConfig(20), SIZE)[0]
        np.testing.assert_array_equal(np.concatenate(list(frames)), expected)


def test_several_threads(decoders, video):
    media = [Media("video", video, i / 8) for i in range(12)]
    expected = [sample(m, FrameConfig(9), SIZE)[0] for m in media]

    def decode(m):
        return np.concatenate(list(decoders.sample(m, FrameConfig(9), SIZE, chunk=3)))

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        for found, right in zip(threads.map(decode, media), expected, strict=True):
            np.testing.assert_array_equal(found, right)


def test_frames_wait_within_the_limit(video):
    """Decoding runs ahead of who takes the frames, but no further than it may."""
    chunk_bytes = 4 * SIZE**2 * 3
    with Decoders(2, ahead_bytes=8 * chunk_bytes) as pool:
        frames = pool.sample(Media("video", video), FrameConfig(COUNT), SIZE, chunk=4)
        first = [next(frames), next(frames)]  # one stretch
        for _ in range(100):
            waiting = sum(future.done() for future in frames._chunks)
            if waiting == 8:
                break
            time.sleep(0.02)
        assert waiting == 8
        time.sleep(0.2)
        assert len(frames._chunks) == 8
        rest = list(frames)
    assert read_numbers(np.concatenate([*first, *rest])) == list(range(COUNT))


def test_a_stretch_that_is_overtaken(video, monkeypatch):
    """The thread that took the second stretch gets a worker only after all others are done."""
    waiting = threading.Event()
    lend = Decoders.worker

    def delayed(self, frames, first=0):
        if first == 8:
            assert waiting.wait(20)
        return lend(self, frames, first)

    monkeypatch.setattr(Decoders, "worker", delayed)
    monkeypatch.setattr("storm_jax.inference.media._STRETCH", 0.1)
    with Decoders(2) as pool:
        frames = pool.sample(Media("video", video), FrameConfig(COUNT), SIZE, chunk=8)
        first = next(frames)
        until = time.monotonic() + 20
        while not all(f.done() for f in list(frames._chunks)[1:]) and time.monotonic() < until:
            time.sleep(0.02)
        assert not frames._chunks[0].done()
        waiting.set()
        assert read_numbers(np.concatenate([first, *frames])) == list(range(COUNT))


def test_damage_is_an_error_at_its_place(decoders, folder):
    path = write(folder / "cut.mp4", COUNT, **FILES["fragmented.mp4"])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError) as expected:
        sample(Media("video", str(path), None, None), FrameConfig(COUNT, fps=30.0), SIZE)
    frames = decoders.sample(Media("video", str(path)), FrameConfig(COUNT, fps=30.0), SIZE, chunk=8)
    taken = 0
    with pytest.raises(MediaError) as raised:
        for chunk in frames:
            assert read_numbers(chunk) == list(range(taken, taken + len(chunk)))
            taken += len(chunk)
    assert raised.value.path == expected.value.path == str(path)
    assert raised.value.reason == expected.value.reason
    assert taken > 0
    assert next(frames, None) is None  # and then it is over


def test_pictures_that_are_too_large(decoders, video):
    few = decoders.sample(Media("video", video), FrameConfig(8), SIZE, max_pixels=64 * 48 - 1)
    with pytest.raises(MediaError) as raised:
        next(few)
    with pytest.raises(MediaError) as expected:
        sample(Media("video", video), FrameConfig(8), SIZE, max_pixels=64 * 48 - 1)
    assert raised.value.reason == expected.value.reason
    enough = decoders.sample(Media("video", video), FrameConfig(8), SIZE, max_pixels=64 * 48)
    assert sum(map(len, enough)) == 8


def test_errors_before_the_first_frame(decoders, video, tmp_path):
    (tmp_path / "empty.mp4").touch()
    for media, reason in (
        (Media("video", str(tmp_path / "none.mp4")), "No such file"),
        (Media("video", str(tmp_path / "empty.mp4")), "is empty"),
        (Media("video", video, 100.0), "start=100 s is outside the video"),
        (Media("image", video + ".png"), "cannot be read"),
    ):
        frames = decoders.sample(media, FrameConfig(8), SIZE)
        if media.kind == "video":  # an image is one frame, whatever is in the file
            with pytest.raises(MediaError, match=reason):
                assert frames.count
        with pytest.raises(MediaError, match=reason):
            next(frames)


def test_time_limit_counts_decoding_only(video):
    media = Media("video", video)
    with Decoders(2, ahead_bytes=0) as pool:
        frames = pool.sample(media, FrameConfig(COUNT), SIZE, timeout=5.0, chunk=8)
        got = 0
        for chunk in frames:
            got += len(chunk)
            frames._spent -= 0.3  # stands for a fast machine; what is taken slowly costs nothing
            time.sleep(0.01)
        assert got == COUNT
        with pytest.raises(MediaError, match="took longer than 1e-06 s to decode"):
            list(pool.sample(media, FrameConfig(8), SIZE, timeout=1e-6))


def test_a_worker_that_hangs_is_killed(tmp_path, video, monkeypatch):
    """Opening a named pipe that nobody writes to: no time limit inside the decoder sees it."""
    monkeypatch.setattr("storm_jax.inference.media._GRACE", 0.2)
    os.mkfifo(tmp_path / "pipe.png")
    with Decoders(1) as pool:
        before = pool.process_ids
        with pytest.raises(MediaError, match="took longer than 0.5 s"):
            list(pool.sample(Media("image", str(tmp_path / "pipe.png")), FrameConfig(8), 8, 0.5))
        assert gone(before)
        assert sum(map(len, pool.sample(Media("video", video), FrameConfig(8), 8))) == 8


def test_a_worker_that_crashes_is_replaced(video):
    with Decoders(1, ahead_bytes=0) as pool:  # what follows is not begun before it is asked for
        frames = pool.sample(Media("video", video), FrameConfig(COUNT), SIZE, chunk=4)
        next(frames)
        (pid,) = pool.process_ids
        os.kill(pid, signal.SIGSEGV)
        with pytest.raises(MediaError, match=r"video.mp4: the process .* died \(signal 11\)"):
            list(frames)
        again = pool.sample(Media("video", video), FrameConfig(COUNT), SIZE)
        assert sum(map(len, again)) == COUNT


def open_files(pid):
    found = []
    for x in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found.append(os.readlink(x))
    return found


def test_closing_early_releases_the_file(decoders, video):
    frames = decoders.sample(Media("video", video), FrameConfig(COUNT), 128, chunk=2)
    next(frames)
    assert any(video in open_files(pid) for pid in decoders.process_ids)
    frames.close()
    assert next(frames, None) is None
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if not any(video in open_files(pid) for pid in decoders.process_ids):
            break
        time.sleep(0.02)
    else:
        pytest.fail("a worker holds the file")


@pytest.mark.parametrize("ahead_bytes", [0, 256 << 20])  # chunks that are not begun, or are
def test_closing_the_pool_in_mid_video_leaves_nothing(video, ahead_bytes):
    shared = set(os.listdir("/dev/shm"))
    pool = Decoders(2, ahead_bytes)
    frames = pool.sample(Media("video", video), FrameConfig(COUNT), 256, chunk=2)
    next(frames)
    pids = pool.process_ids
    pool.close()
    assert not any(map(alive, pids))
    with pytest.raises(concurrent.futures.CancelledError):
        for _ in range(COUNT):
            next(frames)
    assert set(os.listdir("/dev/shm")) <= shared


PARENT = """
import sys, time
import numpy as np
from storm_jax.data.conversation import Media
from storm_jax.frames import FrameConfig
from storm_jax.inference import media as media_module
from storm_jax.inference.media import Decoders

marks = open(sys.argv[2], "a")
marks.write("imported\\n")
marks.flush()
pool = Decoders(2)
frames = pool.sample(Media("video", sys.argv[1]), FrameConfig(120), 256, chunk=2)
next(frames)
loaded = sys.modules.keys() & {"jax", "transformers", "torch"}
print("ready", *loaded, flush=True)
if sys.argv[3] == "wait":
    time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, None])
def test_workers_end_with_their_parent(video, tmp_path, end):
    """No guard around the main module is needed, workers do not run it, and no kill leaves them."""
    (tmp_path / "parent.py").write_text(PARENT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", video, tmp_path / "marks", "wait" if end else ""],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    workers = children(process.pid)
    if end:
        assert len(workers) == 2
        for pid in workers:  # what they have loaded
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert "libavcodec" in maps and "jaxlib" not in maps and "tokenizers" not in maps
        process.send_signal(end)
    _, err = process.communicate(timeout=20)
    assert gone(workers)
    assert (tmp_path / "marks").read_text() == "imported\n"
    if end is None:
        assert process.returncode == 0 and not err


def test_worker_imports_neither_jax_nor_transformers():
    code = (
        "import sys, storm_jax.inference.media, storm_jax.inference.media_worker;"
        "bad = {'jax', 'flax', 'transformers', 'torch', 'orbax'} & set(sys.modules);"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_arguments():
    with pytest.raises(ValueError, match="processes=-1 is negative"):
        Decoders(-1)


def test_a_process_is_replaced_after_some_media(video, monkeypatch):
    monkeypatch.setattr(media_module, "_MOST_MEDIA", 3)
    media = Media("video", video)
    expected, _ = sample(media, FrameConfig(5), SIZE)
    processes = []
    with Decoders(1) as pool:
        for _ in range(7):
            np.testing.assert_array_equal(
                np.concatenate(list(pool.sample(media, FrameConfig(5), SIZE))), expected
            )
            processes += pool.process_ids
    first, second, third = sorted(set(processes), key=processes.index)
    assert processes == [first] * 3 + [second] * 3 + [third]
