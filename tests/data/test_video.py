"""Every file here numbers its frames in the picture, so that a wrong frame shows itself."""

import av
import numpy as np
import pytest

from storm_jax.config import FrameConfig
from storm_jax.data.container import VideoReader
from storm_jax.data.records import Media
from storm_jax.data.video import (
    MediaError,
    SampledMedium,
    decode,
    frame_count,
    probe,
    sample,
    spread,
)
from tests.data.media_files import (
    cut_edit_list,
    picture,
    read_numbers,
    sequential,
    write,
    write_audio,
)

H264 = {"g": "25", "bf": "3", "preset": "veryfast", "sc_threshold": "0"}
VP9 = {"g": "25", "deadline": "realtime", "cpu-used": "8"}
X265 = {
    "preset": "ultrafast",
    "x265-params": "keyint=25:log-level=error:pools=none:frame-threads=1",
}
COUNT = 120
GAPS = np.random.default_rng(0).integers(20, 300, COUNT)

FILES = {
    "h264.mp4": dict(options=H264),
    "h264.mkv": dict(options=H264),
    "fragmented.mp4": dict(options=H264, container={"movflags": "frag_keyframe+empty_moov"}),
    "with_sound.mp4": dict(options=H264, audio_seconds=6.0),
    "open_gop.mp4": dict(options=H264 | {"x264-params": "open-gop=1"}),
    "open_gop.ts": dict(options=H264 | {"x264-params": "open-gop=1"}),
    "intra_refresh.ts": dict(options=H264 | {"x264-params": "intra-refresh=1"}),
    "variable_rate.mp4": dict(options=H264, pts=[int(x) for x in np.cumsum(GAPS) - GAPS[0]]),
    "edit_list.mp4": dict(options=H264),
    "start_offset.mp4": dict(options=H264, pts=range(7500, 7500 + 100 * COUNT, 100)),
    "start_offset.ts": dict(options=H264, pts=range(30000, 30000 + 100 * COUNT, 100)),
    "vp9.webm": dict(codec="libvpx-vp9", options=VP9),
    "vp9_live.webm": dict(codec="libvpx-vp9", options=VP9, container={"live": "1"}),
    "av1.mp4": dict(
        codec="libsvtav1", options={"g": "25", "preset": "12", "svtav1-params": "lp=1"}
    ),
    "hevc.mp4": dict(codec="libx265", options=X265),
    "hevc_10bit.mp4": dict(codec="libx265", options=X265, pix_fmt="yuv420p10le"),
    "h264_10bit.mp4": dict(options=H264, pix_fmt="yuv420p10le"),
    "odd_size.mp4": dict(options=H264, pix_fmt="yuv444p", size=(63, 47)),
    "rotated.mp4": dict(options=H264, rotation=90),
    "mpeg4.avi": dict(codec="mpeg4", options={"g": "25"}),
    "mpeg4_bframes.avi": dict(codec="mpeg4", options={"g": "25", "bf": "2"}),
    "short.gif": dict(codec="gif", pix_fmt="rgb8", fps=10, count=30),
    "one_frame.mp4": dict(options=H264, count=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def file(folder):
    """Writes a file of FILES the first time that it is asked for."""

    def get(name):
        path = folder / name
        if not path.exists():
            write(path, **({"count": COUNT} | FILES[name]))
            if name == "edit_list.mp4":
                cut_edit_list(path, media_time=3700 * 4 + 200, seconds=2.5)
        return path

    return get


def turned(path):
    times, images = sequential(path)
    if path.name == "rotated.mp4":
        images = [np.rot90(image) for image in images]
    return times, images


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "ask", [dict(n=9), dict(n=5, start=0.7, end=2.2), dict(fps=4.0), dict(n=10_000)], ids=str
)
def test_same_frames_as_decoding_the_whole_file(file, name, ask):
    path = file(name)
    times, images = turned(path)
    if ask.get("start", 0) > times[-1]:
        with pytest.raises(MediaError, match="the clip lasts 0.03 s"):
            decode(str(path), **ask)
        return
    frames, real = decode(str(path), **ask)

    known = probe(str(path))
    assert abs(known.frames - len(times)) <= (name == "variable_rate.mp4")
    first, last = ask.get("start", 0.0), ask.get("end", known.duration - 1 / known.fps)
    if "fps" in ask:
        targets = np.arange(0, last + 1e-6, 1 / ask["fps"])
    else:
        targets = np.linspace(first, last, min(ask["n"], known.frames))
    # By hand: the first frame whose time is at least the target less half a frame (and a bit).
    wanted = [
        next((i for i, t in enumerate(times) if t >= x - 0.52 / known.fps), len(times) - 1)
        for x in targets
    ]
    assert frames.dtype == np.uint8 and real.dtype == np.float64
    assert len(frames) == len(targets)
    np.testing.assert_allclose(real, times[wanted], atol=2e-3)
    for frame, i in zip(frames, wanted, strict=True):
        np.testing.assert_array_equal(frame, images[i])


@pytest.mark.parametrize("varying", [False, True])
def test_uneven_times_meet_the_right_frames(tmp_path, varying):
    """Close together and far apart, where most pictures are B and refer to one another."""
    rng = np.random.default_rng(3)
    pts = np.cumsum(rng.integers(20, 300, COUNT)).tolist() if varying else None
    options = {"g": "40", "bf": "6", "b-pyramid": "normal", "b-adapt": "0"}
    path = write(tmp_path / "b.mp4", COUNT, options=options, pts=pts)
    times, images = sequential(path)
    for _ in range(20):
        with VideoReader(str(path)) as reader:
            half = 0.52 / reader.fps
            wanted = np.sort(rng.choice(COUNT, rng.integers(2, 30)))
            # Just inside the span in which the frame is the one that is shown.
            frames, real = reader.read(times[wanted] + half - 1e-3)
        np.testing.assert_allclose(real, times[wanted], atol=2e-3)
        for frame, i in zip(frames, wanted, strict=True):
            np.testing.assert_array_equal(frame, images[i])


@pytest.mark.parametrize("size", [96, 448])
def test_colours_of_scaled_frames(file, size):
    """Against 16 bits: no further off than FFmpeg's straight way from the file's to 8 bits."""
    with av.open(str(file("h264.mp4"))) as container:
        frame = next(container.decode(video=0))
        exact, straight = (
            frame.reformat(size, size, kind, interpolation="BICUBIC").to_ndarray()
            for kind in ("rgb48le", "rgb24")
        )
    shown = decode(str(file("h264.mp4")), n=1, size=size)[0][0]

    def error(image):
        return np.sqrt(((image - exact / 257) ** 2).mean())

    assert error(shown) < 1.02 * error(straight) < 1.2
    assert abs(shown - exact / 257).max() < 4


def test_numbers_of_the_frames(file):
    def numbers(name, **ask):
        return read_numbers(decode(str(file(name)), **ask)[0])

    assert numbers("h264.mp4", n=8) == [0, 17, 34, 51, 68, 85, 102, 119]
    assert numbers("start_offset.ts", n=8) == [0, 17, 34, 51, 68, 85, 102, 119]
    assert numbers("vp9.webm", n=3, start=1.0, end=3.0) == [30, 60, 90]
    assert numbers("hevc.mp4", fps=1.0) == [0, 30, 60, 90]
    assert numbers("h264.mp4", fps=30.0, max_frames=4) == [0, 40, 79, 119]
    assert numbers("h264.mp4", n=1) == [0]
    assert numbers("h264.mp4", n=1, start=2.0) == [60]
    assert numbers("one_frame.mp4", n=5) == [0]
    # The edit list starts within frame 37 and lasts 2.5 s: 75 frames from number 37 or 36 on.
    shown = numbers("edit_list.mp4", n=1000)
    assert len(shown) == 75 and shown == list(range(shown[0], shown[0] + 75))
    assert shown[0] in (36, 37, 38)


@pytest.mark.parametrize(
    "name, duration, fps, frames, codec",
    [
        ("h264.mp4", 4.0, 30, 120, "h264"),
        ("with_sound.mp4", 4.0, 30, 120, "h264"),
        ("fragmented.mp4", 4.0, 30, 120, "h264"),
        ("edit_list.mp4", 2.5, 30, 75, "h264"),
        ("start_offset.mp4", 4.0, 30, 120, "h264"),
        ("start_offset.ts", 4.0, 30, 120, "h264"),
        ("vp9.webm", 4.0, 30, 120, "vp9"),
        ("vp9_live.webm", 4.0, 30, 120, "vp9"),
        ("short.gif", 3.0, 10, 30, "gif"),
        ("one_frame.mp4", 1 / 30, 30, 1, "h264"),
    ],
)
def test_probe(file, name, duration, fps, frames, codec):
    found = probe(str(file(name)))
    assert (found.kind, found.frames, found.codec) == ("video", frames, codec)
    assert (found.width, found.height, found.rotation) == (64, 48, 0)
    assert found.duration == pytest.approx(duration, abs=2e-3)
    assert found.fps == pytest.approx(fps, rel=1e-3)


def test_rotation_turns_the_picture_upright(file):
    found = probe(str(file("rotated.mp4")))
    assert (found.width, found.height, found.rotation) == (64, 48, 90)
    frames, _ = decode(str(file("rotated.mp4")), n=2)
    assert frames.shape == (2, 64, 48, 3)
    square, _ = decode(str(file("rotated.mp4")), n=2, size=32)
    assert square.shape == (2, 32, 32, 3)
    # Counter-clockwise: what is stored at the right comes to the top.
    small = picture(119)[:, ::-1].transpose(1, 0, 2).reshape(32, 2, 48, 3).mean(1)
    assert np.abs(square[1].mean(1) - small.mean(1)).mean() < 8


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_all_eight_orientations_of_a_video(folder, rotation, mirrored):
    path = folder / f"turned_{rotation}_{mirrored}.mp4"
    write(path, 1, options=H264, size=(48, 48), number=11, rotation=rotation, mirrored=mirrored)
    frames, _ = decode(str(path), n=1)
    stored = picture(11, 48, 48).astype(int)
    error = {
        (turn, flip): np.abs(
            frames[0] - np.rot90(stored, turn // 90)[:, :: -1 if flip else 1]
        ).mean()
        for turn in (0, 90, 180, 270)
        for flip in (False, True)
    }
    assert min(error, key=error.get) == (rotation, mirrored) and error[rotation, mirrored] < 12
    assert sorted(error.values())[1] > 1.5 * error[rotation, mirrored]


def test_size_scales_the_whole_frame(file):
    frames, _ = decode(str(file("h264.mp4")), n=3, size=16)
    full, _ = decode(str(file("h264.mp4")), n=3)
    assert frames.shape == (3, 16, 16, 3)
    means = full.reshape(3, 16, 3, 16, 4, 3).mean((2, 4))  # 48 x 64 in blocks of 3 x 4
    assert np.abs(frames - means).mean() < 5
    assert np.abs(frames[:, ::-1] - means).mean() > 10
    assert read_numbers(decode(str(file("h264.mp4")), n=3, size=48)[0]) == [0, 59, 119]


def test_bytes_are_read_like_the_file(file):
    path = file("open_gop.ts")
    a, times_a = decode(str(path), n=5)
    b, times_b = decode(path.read_bytes(), n=5)
    with path.open("rb") as opened:
        opened.seek(99)  # wherever it stands
        c, times_c = decode(opened, n=5)
        assert not opened.closed
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(times_a, times_c)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(times_a, times_b)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"one_frame.mp4", "short.gif"}))
def test_key_frames_are_at_or_before_the_targets(file, name):
    path = file(name)
    times, images = turned(path)
    last = times[-1]
    frames, real = decode(str(path), n=7, keyframes_only=True)
    targets = np.linspace(0, last, 7)
    assert (np.diff(real) >= 0).all()
    shown = np.searchsorted(times, real - 1e-3)
    for frame, i in zip(frames, shown, strict=True):
        np.testing.assert_array_equal(frame, images[i])
    # A key frame comes at least every 25 frames; gradual refresh has but the first one to start on.
    late = real - targets
    assert (late[real > real[0]] <= 0.5 / 30 + 2e-3).all()
    if name not in ("intra_refresh.ts", "edit_list.mp4", "variable_rate.mp4"):
        assert (late >= -27 / 30).all()


def test_last_frame_is_shown_until_the_end(folder):
    """60 frames in 2 s, the last of them shown for 4 s more: nothing is missing at the end."""
    path = write(folder / "held.mp4", 60, options=H264, hold=12100)
    assert probe(str(path)).duration == pytest.approx(6.0, abs=0.05)
    frames, times = decode(str(path), n=6)  # at 0, 1.18, 2.36 ... s, less 0.52 * 0.1 s
    assert read_numbers(frames) == [0, 34, 59, 59, 59, 59]
    assert times.max() == pytest.approx(59 / 30)
    assert read_numbers(decode(str(path), n=2, start=5.0)[0]) == [59, 59]
    keys, _ = decode(str(path), n=6, keyframes_only=True)
    assert read_numbers(keys) == [0, 25, 50, 50, 50, 50]


# ----------------------------------------------------------------------------------- damaged files


def test_files_that_are_no_videos(folder, file):
    whole = file("h264.mp4").read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video\n" * 50)
    (folder / "no_index.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    write_audio(folder / "audio.m4a")
    for name, reason in {
        "empty.mp4": "is empty",
        "text.mp4": "cannot be opened: Invalid data",
        "no_index.mp4": "cannot be opened: Invalid data",
        "missing.mp4": "No such file",
        "audio.m4a": "has no video stream .it holds audio",
        "": "is a folder",
    }.items():
        for call in (lambda path: decode(path, n=4), probe if name else decode_one):
            with pytest.raises(MediaError, match=reason) as error:
                call(str(folder / name))
            assert error.value.path == str(folder / name)
            assert str(error.value).startswith(str(folder / name))


def decode_one(path):
    return decode(path, n=1)


def test_truncated_mp4_serves_what_lies_before_the_cut(folder):
    path = write(folder / "whole.mp4", COUNT, options=H264, container={"movflags": "faststart"})
    data = path.read_bytes()
    cut = folder / "cut.mp4"
    cut.write_bytes(data[: len(data) * 6 // 10])
    assert probe(str(cut)).frames == COUNT  # the header still promises all of them
    for keys in (False, True):
        with pytest.raises(MediaError, match="damaged|truncated"):
            decode(str(cut), n=8, keyframes_only=keys)
        with pytest.raises(MediaError, match="damaged|truncated"):
            decode(str(cut), n=2, start=3.5, keyframes_only=keys)
    frames, times = decode(str(cut), n=4, end=1.5)
    assert read_numbers(frames) == [0, 15, 30, 45]
    np.testing.assert_allclose(times, [0, 0.5, 1.0, 1.5])


@pytest.mark.parametrize("name", ["h264.mkv", "vp9.webm"])
def test_truncated_matroska(folder, file, name):
    data = file(name).read_bytes()
    cut = folder / f"cut_{name}"
    cut.write_bytes(data[: len(data) * 6 // 10])
    for keys in (False, True):
        with pytest.raises(MediaError, match="damaged|truncated"):
            decode(str(cut), n=8, keyframes_only=keys)
    assert read_numbers(decode(str(cut), n=4, end=1.5)[0]) == [0, 15, 30, 45]


def test_corrupted_in_the_middle(folder):
    path = write(
        folder / "big.mp4",
        COUNT,
        options=H264,
        size=(320, 240),
        container={"movflags": "faststart"},
    )
    times, images = sequential(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = (
        np.random.default_rng(0).integers(0, 256, 3000, np.uint8).tobytes()
    )
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"is damaged .*\d\.\d\d s"):
        decode(str(path), n=COUNT)
    for clip in (dict(end=1.0), dict(start=3.0)):
        frames, real = decode(str(path), n=6, **clip)
        for frame, t in zip(frames, real, strict=True):
            np.testing.assert_array_equal(frame, images[int(np.abs(times - t).argmin())])


def test_stream_cut_out_of_a_broadcast(folder, file):
    data = file("start_offset.ts").read_bytes()
    path = folder / "from_the_middle.ts"
    path.write_bytes(data[188 * 40 :])  # whole packets; no key frame in front
    frames, times = decode(str(path), n=4)
    numbers = read_numbers(frames)
    assert numbers[0] > 0 and numbers[-1] == 119
    assert times[0] == 0
    np.testing.assert_allclose(np.diff(numbers) / 30, np.diff(times), atol=1e-6)


def test_picture_size_changes_on_the_way(folder):
    parts = []
    for name, size, first in (("small.ts", (64, 48), 0), ("large.ts", (96, 72), 30)):
        pts = range(first * 100, first * 100 + 3000, 100)
        write(folder / name, 30, options=H264 | {"bf": "0"}, pts=pts, size=size, number=first)
        parts.append((folder / name).read_bytes())
    path = folder / "joined.ts"
    path.write_bytes(b"".join(parts))
    frames, times = decode(str(path), n=7, size=48)
    assert read_numbers(frames) == [0, 10, 20, 29, 39, 49, 59]
    np.testing.assert_allclose(times * 30, [0, 10, 20, 29, 39, 49, 59], atol=1e-3)
    with pytest.raises(MediaError, match="picture size changes at 1.31 s from 64x48 to 96x72"):
        decode(str(path), n=7)


def test_no_timestamps(folder):
    path = write(folder / "raw.h264", 10, options=H264, format="h264")
    with pytest.raises(MediaError, match="no timestamps"):
        decode(str(path), n=4)


def test_clip_outside_the_video(file):
    path = str(file("h264.mp4"))
    for clip, reason in (
        (dict(start=4.0), r"start=4 s is outside the video: the clip lasts 4.00 s"),
        (dict(start=-1.0), r"start=-1 s is outside"),
        (dict(end=5.5), r"end=5.5 s is outside the video: the clip lasts 4.00 s"),
        (dict(start=2.0, end=2.0), r"end=2 s is not after start"),
    ):
        with pytest.raises(MediaError, match=reason) as error:
            decode(path, n=4, **clip)
        assert error.value.path == path
    # Annotations are rounded up to whole seconds: a little late means the end.
    assert read_numbers(decode(path, n=2, end=4.4)[0]) == [0, 119]
    assert read_numbers(decode(path, n=3, start=3.99)[0]) == [119]


def test_time_limit(file):
    with pytest.raises(MediaError, match="took longer than 1e-09 s"):
        decode(str(file("h264.mp4")), n=8, timeout=1e-9)
    assert len(decode(str(file("h264.mp4")), n=8, timeout=60.0)[0]) == 8


def test_tags_that_are_not_utf8(folder, file):
    data = file("h264.mkv").read_bytes()
    assert b"matroska" in data and data.count(b"Lavf") >= 1
    path = folder / "tags.mkv"
    path.write_bytes(data.replace(b"Lavf", b"L\xe9\xff\xfe"))  # the name of the writing program
    assert read_numbers(decode(str(path), n=2)[0]) == [0, 119]


def test_arguments(file):
    path = str(file("h264.mp4"))
    for ask in (dict(), dict(n=3, fps=2.0), dict(n=0), dict(fps=0.0)):
        with pytest.raises(ValueError, match="decode: "):
            decode(path, **ask)


# -------------------------------------------------------------------------------------- the policy


POLICIES = [
    FrameConfig(max_frames=8),
    FrameConfig(max_frames=500),
    FrameConfig(max_frames=64, fps=2.0),
    FrameConfig(max_frames=5, fps=2.0),
    FrameConfig(max_frames=500, fps=100.0),
    FrameConfig(max_frames=8, keyframes_only=True),
]


@pytest.mark.parametrize("frames", POLICIES, ids=str)
@pytest.mark.parametrize("name", FILES)
def test_frame_count_is_what_sample_returns(file, name, frames):
    for span in ((None, None), (0.5, 1.9), (1.0, None)):
        media = Media("video", str(file(name)), *span)
        try:
            planned = frame_count(probe(media.path), media, frames)
        except MediaError:
            assert name == "one_frame.mp4" and span != (None, None)
            continue
        images, times = sample(media, frames, size=16)
        assert images.shape == (planned, 16, 16, 3) and times.shape == (planned,)
        assert planned <= frames.max_frames


def test_sample_follows_the_policy(file):
    media = Media("video", str(file("h264.mp4")))
    assert read_numbers(sample(media, POLICIES[0], 48)[0]) == [0, 17, 34, 51, 68, 85, 102, 119]
    assert read_numbers(sample(media, POLICIES[2], 48)[0]) == [0, 15, 30, 45, 60, 75, 90, 105]
    assert read_numbers(sample(media, POLICIES[3], 48)[0]) == [0, 30, 59, 89, 119]
    keys, _ = sample(media, POLICIES[5], 48)
    assert read_numbers(keys) == [0, 0, 25, 50, 50, 75, 100, 100]


@pytest.fixture(scope="module")
def images(folder):
    """A folder of 12 frames whose names sort differently as text, and other files."""
    path = folder / "frames"
    path.mkdir()
    for i in range(12):
        write(path / f"c01_{i}.png", 1, codec="png", format="image2", pix_fmt="rgb24", number=i)
    (path / "notes.txt").write_text("no image")
    return path


@pytest.mark.parametrize("keyframes_only", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_frames_do_not_depend_on_the_stretch(file, name, keyframes_only):
    media = Media("video", str(file(name)))
    policy = FrameConfig(30, keyframes_only=keyframes_only)
    whole, real = sample(media, policy, 24)
    for first in range(0, len(whole), 7):
        with SampledMedium(media, policy, 24) as medium:
            assert len(medium.times) == len(whole)
            for start in (first, first + 3):
                frames, times = medium.read(start, start + 3)
                np.testing.assert_array_equal(frames, whole[start : start + 3])
                np.testing.assert_array_equal(times, real[start : start + 3])
                if start + 3 >= len(whole):
                    break


def test_stretches_must_ascend(file):
    with SampledMedium(Media("video", str(file("h264.mp4"))), FrameConfig(30), 24) as medium:
        medium.read(5, 9)
        with pytest.raises(ValueError, match="frames from 8 on were asked for behind frame 8"):
            medium.read(8, 12)
        medium.read(9, 12)


def test_frame_folder(images):
    media = Media("video", str(images))
    found = probe(media.path)
    assert (found.kind, found.frames, found.fps, found.width) == ("frames", 12, 1.0, 64)
    frames, times = sample(media, FrameConfig(max_frames=4), 48)
    assert read_numbers(frames) == [0, 4, 7, 11]
    assert times.tolist() == [0, 4, 7, 11]
    assert read_numbers(sample(media, FrameConfig(max_frames=50), 48)[0]) == list(range(12))
    part = Media("video", str(images), 2.0, 5.0)
    assert read_numbers(sample(part, FrameConfig(max_frames=50), 48)[0]) == [2, 3, 4, 5]
    for policy in POLICIES:
        assert len(sample(part, policy, 8)[0]) == frame_count(found, part, policy)
    with pytest.raises(MediaError, match="the clip lasts 12.00 s"):
        sample(Media("video", str(images), 12.0), FrameConfig(max_frames=4), 8)


@pytest.mark.parametrize("name", ["a.png", "a%03d.png", "b.jpg", "c.bmp", "d.webp", "e.gif"])
def test_images(folder, name):
    codec = {"png": "png", "jpg": "mjpeg", "bmp": "bmp", "webp": "libwebp", "gif": "gif"}
    pixels = {"jpg": "yuvj420p", "webp": "yuv420p", "bmp": "bgr24", "gif": "rgb8"}
    ending = name.split(".")[1]
    made = write(
        folder / f"image.{ending}",
        1,
        codec=codec[ending],
        format="gif" if ending == "gif" else "image2",
        pix_fmt=pixels.get(ending, "rgb24"),
        number=341,
    )
    path = folder / name
    made.rename(path)
    media = Media("image", str(path))
    found = probe(media.path, "image")
    assert (found.kind, found.frames, found.width, found.height) == ("image", 1, 64, 48)
    frames, times = sample(media, FrameConfig(max_frames=8), 48)
    assert read_numbers(frames) == [341] and times.tolist() == [0.0]
    assert frame_count(found, media, FrameConfig(max_frames=8)) == 1


ORIENTATIONS = {  # of EXIF: what the stored picture looks like when it is shown
    1: lambda p: p,
    3: lambda p: p[::-1, ::-1],
    6: lambda p: np.rot90(p, -1),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation_of_photographs(folder, orientation):
    path = folder / f"photo{orientation}.jpg"
    write(path, 1, codec="mjpeg", format="image2", pix_fmt="yuvj420p", size=(64, 64), number=341)
    data = path.read_bytes()
    tag = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0" + bytes([orientation]) + bytes(6)
    length = (len(tag) + 2).to_bytes(2, "big")
    path.write_bytes(data[:2] + b"\xff\xe1" + length + tag + data[2:])
    frames, _ = sample(Media("image", str(path)), FrameConfig(max_frames=1), 64)
    stored = picture(341, 64, 64).astype(int)
    error = {k: np.abs(frames[0] - turn(stored)).mean() for k, turn in ORIENTATIONS.items()}
    assert error[orientation] < 8, error
    assert min(v for k, v in error.items() if k != orientation) > 15, error


def test_spread():
    assert spread(12, 4) == [0, 4, 7, 11]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(5, 1) == [0]


def test_bad_images_and_folders(folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    (folder / "nothing").mkdir()
    for name, kind, reason in (
        ("empty.png", "image", "is empty"),
        ("text.png", "image", "is not an image"),
        ("none.png", "image", "No such file"),
        ("nothing", "image", "Is a directory"),
        ("nothing", "video", "is a folder without images"),
    ):
        with pytest.raises(MediaError, match=reason):
            sample(Media(kind, str(folder / name)), FrameConfig(max_frames=2), 8)
        with pytest.raises(MediaError, match=reason):
            probe(str(folder / name), kind)
