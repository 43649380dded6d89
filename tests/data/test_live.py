"""Frames as they come: files, pipes, TCP and RTSP, against what was put in."""

import io
import itertools
import os
import threading
import time

import numpy as np
import pytest

from storm_jax.data.container import MediaError
from storm_jax.data.live import (
    Feed,
    Thinning,
    TimedFrame,
    file_frames,
    live_frames,
    paced,
    raw_frames,
)
from storm_jax.data.video import decode
from tests.data.media_files import picture, read_numbers, write
from tests.data.stream_servers import camera, serving


def numbers(frames) -> list[int]:
    return read_numbers(np.stack([frame.image for frame in frames]))


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("fps", [0.5, 3.0, 7.0, 10.0, 100.0])
def test_a_file_gives_the_frames_of_decode(tmp_path, fps):
    path = str(write(tmp_path / "a.mp4", 47, fps=10, options={"bf": "2", "g": "12"}))
    frames, times = decode(path, fps=fps, size=64)
    got = list(file_frames(path, 64, fps))
    np.testing.assert_array_equal(np.stack([f.image for f in got]), frames)
    np.testing.assert_array_equal([f.time for f in got], times)


def test_a_file_gives_all_its_frames(tmp_path):
    path = str(write(tmp_path / "a.mp4", 30, fps=10))
    assert numbers(file_frames(path, 64)) == list(range(30))


def test_no_frame_of_a_file_comes_twice(tmp_path):
    """Where the frame rate varies, `decode` repeats what is shown for long."""
    pts = [0, 100, 200, 300, 2300, 2400, 2500, 2600]  # hundredths of 1/10 s
    path = str(write(tmp_path / "a.mp4", 8, fps=10, pts=pts))
    repeated = read_numbers(decode(path, fps=2, size=64)[0])
    assert len(set(repeated)) < len(repeated)
    assert numbers(file_frames(path, 64, 2)) == list(dict.fromkeys(repeated))


def test_a_damaged_file_gives_what_lies_before(tmp_path):
    path = write(
        tmp_path / "a.mp4", 60, fps=10, options={"g": "10"}, container={"movflags": "faststart"}
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    got = []
    with pytest.raises(MediaError, match="a.mp4"):
        for frame in file_frames(str(path), 64, 2):
            got.append(frame)
    assert numbers(got) == list(range(0, 5 * len(got), 5)) and len(got) >= 5


# ---------------------------------------------------------------------------------------- thinning


@pytest.mark.parametrize("fps,rate", [(1, 30), (3, 10), (7, 25), (24, 25), (25, 25), (30, 25)])
def test_thinning_takes_the_frame_nearest_to_each_tick(fps, rate):
    thinning = Thinning(fps, rate)
    times = np.arange(20 * rate) / rate
    taken = [t for t in times if thinning.takes(t)]
    if fps >= rate:
        assert len(taken) == len(times)
        return
    ticks = np.arange(20 * fps) / fps
    nearest = [times[np.abs(times - tick).argmin()] for tick in ticks if tick <= times[-1]]
    np.testing.assert_allclose(taken[: len(nearest)], nearest)


def test_thinning_does_not_make_up_for_a_gap():
    thinning = Thinning(1, 0)
    taken = [t for t in (0, 0.4, 0.9, 1.1, 1.5, 60.3, 60.4, 61.0, 61.9, 62) if thinning.takes(t)]
    assert taken == [0, 1.1, 60.3, 61.0, 62]


# ------------------------------------------------------------------------------------------- pipes


def test_raw_frames_of_a_pipe():
    pictures = [picture(i, 96, 48) for i in range(9)]
    pipe = io.BytesIO(b"".join(p.tobytes() for p in pictures))
    got = list(raw_frames(pipe, 96, 48, rate=4, size=64, fps=2))
    assert numbers(got) == [0, 2, 4, 6, 8]
    assert [f.time for f in got] == [0, 0.5, 1, 1.5, 2]
    assert got[0].image.shape == (64, 64, 3)


def test_raw_frames_are_not_scaled_where_they_fit():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (got,) = raw_frames(io.BytesIO(image.tobytes()), 32, 32, rate=1, size=32)
    np.testing.assert_array_equal(got.image, image)


def test_a_pipe_that_ends_within_a_frame():
    data = picture(0).tobytes() * 2 + b"x" * 100
    frames = raw_frames(io.BytesIO(data), 64, 48, rate=1, size=32)
    assert len(list(itertools.islice(frames, 2))) == 2
    with pytest.raises(MediaError, match="100 of the 9216 bytes of frame 2.*64x48"):
        next(frames)


def test_a_pipe_that_writes_in_pieces():
    reading, writing = os.pipe()

    def feed():
        with os.fdopen(writing, "wb", buffering=0) as file:
            data = b"".join(picture(i).tobytes() for i in range(3))
            for start in range(0, len(data), 5000):
                file.write(data[start : start + 5000])

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        assert numbers(raw_frames(pipe, 64, 48, rate=1, size=64)) == [0, 1, 2]
    thread.join()


# ------------------------------------------------------------------------------------------- feeds


def numbered(count, pause=0.0):
    for i in range(count):
        time.sleep(pause)
        yield TimedFrame(float(i), np.full((1, 1, 3), i, np.uint8))


def taken(feed, pause=0.0):
    got = []
    while not feed.ended:
        frame = feed.take(5.0)
        if frame is not None:
            got.append(frame.time)
        time.sleep(pause)
    return got


def test_a_file_waits_for_its_reader():
    running = []

    def watched():
        for frame in numbered(50):
            running.append(frame.time)
            yield frame

    feed = Feed(watched(), depth=4, drop=False)
    time.sleep(0.2)
    assert len(running) == 5  # four wait, and one has no room
    assert taken(feed) == list(range(50)) and feed.dropped == 0


def test_a_camera_does_not_wait():
    feed = Feed(numbered(50), depth=4, drop=True)
    time.sleep(0.2)
    assert taken(feed) == [46, 47, 48, 49]
    assert feed.dropped == 46
    feed = Feed(numbered(30, pause=0.01), depth=2, drop=True)
    got = taken(feed, pause=0.05)
    assert got == sorted(set(got)) and len(got) + feed.dropped == 30 and feed.dropped > 5


def test_a_feed_hands_on_errors_behind_the_frames_before_them():
    def broken():
        yield from numbered(3)
        raise MediaError("here", "broke")

    feed = Feed(broken(), depth=8, drop=True)
    time.sleep(0.1)
    assert [feed.take(1).time for _ in range(3)] == [0, 1, 2]
    assert not feed.ended
    with pytest.raises(MediaError, match="here: broke"):
        feed.take(1)
    assert feed.ended and feed.take(0) is None


def test_a_closed_feed_ends_its_source():
    feed = Feed(numbered(10**9), depth=4, drop=False)
    feed.take(1)
    feed.close()
    assert not feed._thread.is_alive()


def test_a_files_own_pace():
    began = time.monotonic()
    arrivals = [
        time.monotonic() - began - f.time
        for f in paced(TimedFrame(0.1 * f.time, f.image) for f in numbered(6))
    ]
    assert all(-0.005 < late < 0.1 for late in arrivals), arrivals


# ---------------------------------------------------------------------------------- live: TCP, RTSP


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips of MPEG-TS, 30 frames at 10 a second, numbered from 0 and from 100 on."""
    folder = tmp_path_factory.mktemp("live")
    options = {"g": "5", "bf": "0"}
    return [
        write(
            folder / f"{n}.ts", 30, fps=10, format="mpegts", options=options, number=n
        ).read_bytes()
        for n in (0, 100)
    ]


def sending(clips):
    return lambda connection, number: connection.sendall(clips[min(number, len(clips)) - 1])


def url(server, scheme="tcp"):
    return f"{scheme}://127.0.0.1:{server.server_address[1]}"


def test_tcp_to_its_end(clips):
    with serving(sending(clips)) as server:
        got = list(live_frames(url(server), 64, 2.0, reconnects=0))
    assert numbers(got) == [0, 5, 10, 15, 20, 25]
    np.testing.assert_allclose([f.time for f in got], np.arange(6) / 2, atol=1e-4)


def test_a_lost_connection_is_made_again(clips):
    notices = []
    with serving(sending(clips)) as server:
        frames = live_frames(url(server), 64, notice=notices.append, waits=(0.3, 0.01))
        got = list(itertools.islice(frames, 60))
        assert numbers(got) == [*range(30), *range(100, 130)]
        times = np.array([f.time for f in got])
        assert (np.diff(times) > 0).all() and server.connections == 2
        np.testing.assert_allclose(np.diff(times)[[*range(29), *range(30, 59)]], 0.1, atol=1e-3)
        frames.close()
    assert "lost (it ended); attempt 1 of 5 in 0.3 s" in notices[0]
    assert "connected again" in notices[1]


def test_a_source_that_does_not_come_back(clips):
    notices = []
    with serving(sending(clips[:1])) as server:
        address = url(server)
        frames = live_frames(
            address, 64, notice=notices.append, reconnects=2, waits=(0.1,), timeout=2
        )
        got = list(itertools.islice(frames, 30))
    assert len(got) == 30
    with pytest.raises(MediaError, match=r"lost after 2\.9 s and not back in 2 attempts"):
        next(frames)
    assert len(notices) == 2


def test_a_source_that_falls_silent(clips):
    held = threading.Event()

    def silent(connection, number):
        connection.sendall(clips[0][: len(clips[0]) // 2 // 188 * 188])
        held.wait(20)

    with serving(silent) as server:
        frames = live_frames(url(server), 64, reconnects=0, timeout=0.5)
        got = []
        with pytest.raises(MediaError, match=r"lost after .*nothing came for 0\.5 s"):
            for frame in frames:
                got.append(frame)
        held.set()
    assert 5 < len(got) < 30


def test_damage_on_the_way_is_passed_over(clips):
    packets = [clips[0][i : i + 188] for i in range(0, len(clips[0]), 188)]
    rng = np.random.default_rng(0)
    middle = range(len(packets) // 3, len(packets) // 2)
    for i in middle:
        packets[i] = packets[i][:4] + rng.bytes(184)
    with serving(sending([b"".join(packets)])) as server:
        got = list(live_frames(url(server), 64, reconnects=0))
    assert {25, 26, 27, 28} <= set(numbers(got)) and {0, 1, 2, 3} <= set(numbers(got))


def test_an_rtsp_camera(clips):
    notices = []
    with serving(camera(clips, seconds=0.4)) as server:
        frames = live_frames(
            url(server, "rtsp") + "/live", 64, 5.0, notice=notices.append, waits=(0.05,)
        )
        got = numbers(itertools.islice(frames, 30))
        assert server.connections == 2
        frames.close()
    # The last frames before the cut may still lie in FFmpeg's reordering.
    first = [n for n in got if n < 100]
    assert first == list(range(0, 2 * len(first), 2)) and len(first) >= 12
    second = [n for n in got if n >= 100]
    assert np.diff(second).tolist() == [2] * (len(second) - 1) and len(second) >= 12
    assert any("attempt 1 of 5" in n for n in notices)


def test_sources_that_cannot_be_opened(clips, tmp_path):
    with serving(sending([b""])) as server:
        closed = url(server)
    began = time.monotonic()
    with pytest.raises(MediaError, match="tcp://.*cannot be opened"):
        next(live_frames(closed, 64))
    with pytest.raises(MediaError, match="cannot be opened"):
        next(live_frames("/dev/no_camera", 64))
    with serving(sending([b"no video at all" * 1000])) as server:
        with pytest.raises(MediaError, match="cannot be opened"):
            next(live_frames(url(server), 64, timeout=2))
    assert time.monotonic() - began < 5
    with pytest.raises(MediaError, match="none.mp4"):
        next(file_frames(str(tmp_path / "none.mp4"), 64))
