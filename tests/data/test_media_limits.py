"""Media that would fill memory or make the decoder open something else."""

import io
import subprocess
import sys
from pathlib import Path

import av
import pytest

from storm_jax.config import FrameConfig
from storm_jax.data.records import Media
from storm_jax.data.video import MediaError, sample
from tests.data.media_files import blank_png, write
from tests.data.test_video import COUNT, FILES


def test_large_pictures_are_not_decoded():
    """Of a picture of 144 million pixels, 430 MB, the process never holds more than the file."""
    code = f"""
import io, resource, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from storm_jax.config import FrameConfig
from storm_jax.data.video import MediaError, sample
from storm_jax.data.records import Media
from tests.data.media_files import blank_png
data = blank_png(12_000, 12_000)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
try:
    sample(Media("image", "bomb.png", data=data), FrameConfig(max_frames=1), 32, None, 1 << 26)
except MediaError as error:
    print(error)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, grown = done.stdout.splitlines()
    assert reason == "bomb.png: has no picture that can be decoded within 67108864 pixels"
    assert int(grown) < 50, grown


def test_pixel_limit(tmp_path):
    policy = FrameConfig(max_frames=2)
    picture = Media("image", "a.png", data=blank_png(64, 48))
    assert sample(picture, policy, 8, None, 64 * 48)[0].shape == (1, 8, 8, 3)
    with pytest.raises(MediaError, match="within 3071 pixels"):
        sample(picture, policy, 8, None, 64 * 48 - 1)
    clip = Media("video", str(write(tmp_path / "h264.mp4", COUNT, **FILES["h264.mp4"])))
    assert len(sample(clip, policy, 8, None, 64 * 48)[0]) == 2
    with pytest.raises(MediaError, match="has 64x48 pixels: more than the limit of 3071"):
        sample(clip, policy, 8, None, 64 * 48 - 1)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_bytes_cannot_make_the_decoder_open_anything(kind):
    """A session description, for one: FFmpeg would listen on the port that it names."""
    description = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    description += b"m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    with av.open(io.BytesIO(description)) as container:
        assert container.format.name == "sdp"  # it is one that FFmpeg understands
    with pytest.raises(MediaError, match="x.mp4"):
        sample(Media(kind, "x.mp4", data=description), FrameConfig(max_frames=2), 8, 5.0)
