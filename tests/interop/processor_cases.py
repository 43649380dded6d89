"""What the tests ask of an exported processor: media, chats, rendered prompts, mistakes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from storm_jax.data import text
from storm_jax.data.conversation import Media
from storm_jax.data.drawing import write_video
from storm_jax.frames import FrameConfig
from tests.data.media_files import picture, write

Image = pytest.importorskip("PIL.Image")

H264 = {"g": "12", "bf": "3", "preset": "veryfast"}


def write_media(folder: Path) -> None:
    """Videos, images and folders of frames."""
    rng = np.random.default_rng(0)
    write_video(str(folder / "synthetic.mp4"), synthetic_frames(rng))
    write(folder / "long.mp4", 90, options=H264)
    gaps = rng.integers(20, 300, 60)
    write(folder / "variable.mp4", 60, options=H264, pts=[int(x) for x in np.cumsum(gaps)])
    write(folder / "rotated.mp4", 30, options=H264, rotation=90)
    write(folder / "short.mp4", 3, options=H264)
    write(folder / "vp9.webm", 20, codec="libvpx-vp9", options={"cpu-used": "8"})
    Image.fromarray(picture(5)).save(folder / "image.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.fromarray(picture(9)).save(folder / "image.jpg", exif=exif)
    (folder / "frames").mkdir()
    for number in range(12):
        Image.fromarray(picture(number)).save(folder / "frames" / f"f{number}.png")
    (folder / "empty").mkdir()
    (folder / "broken.mp4").write_bytes(b"no video")


def synthetic_frames(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8).repeat(2, 1).repeat(2, 2)


VIDEOS = {
    "synthetic": dict(path="synthetic.mp4"),
    "long": dict(path="long.mp4"),
    "variable rate": dict(path="variable.mp4"),
    "rotated": dict(path="rotated.mp4"),
    "clip": dict(path="long.mp4", start=0.7, end=2.2),
    "from a time on": dict(path="variable.mp4", start=1),
    "short": dict(path="short.mp4"),
    "webm": dict(path="vp9.webm"),
    "folder": dict(path="frames"),
    "part of a folder": dict(path="frames", start=2.0, end=5.0),
}
IMAGES = {"png": dict(path="image.png"), "jpeg": dict(path="image.jpg")}
POLICIES = {
    "5 frames": (dict(num_frames=5), lambda c: FrameConfig(5, 0.0, c.keyframes_only)),
    "more than there are": (dict(num_frames=99), lambda c: FrameConfig(99, 0.0, c.keyframes_only)),
    "at most 3": (dict(max_frames=3), lambda c: dataclasses.replace(c, max_frames=3)),
    "4 a second": (dict(fps=4.0), lambda c: dataclasses.replace(c, fps=4.0)),
    "spread evenly": (dict(fps=0.0), lambda c: dataclasses.replace(c, fps=0.0)),
}
CHATS = {
    "text only": [("user", "Why? ")],
    "system": [("system", "Be brief. "), ("user", " <video>\nWhy?\n")],
    "several turns": [
        ("user", "<image> or <video>?"),
        ("assistant", " The video: ja, 狗 🐕\n"),
        ("user", "Sure?\n\nReally?"),
        ("assistant", "Yes"),
        ("user", "Once more: <video>"),
    ],
    "system and several turns": [
        ("system", "S"),
        ("user", "a<video>b<image>"),
        ("assistant", "A"),
        ("user", "U"),
    ],
    # From the rendered text alone a tokenizer cannot know these two:
    "an answer that begins with a line break": [
        ("user", "U"),
        ("assistant", "\nA"),
        ("user", "V"),
    ],
    "spelled special tokens": [("user", "<end_of_turn>\n<bos><|im_end|><eos><|video_pad|>")],
}


def messages(turns: list[tuple[str, str]], folder: Path) -> tuple[list[dict], list[Media]]:
    """A chat with its media as parts, and these media: videos and images take turns."""
    pools = {"<video>": ["short.mp4", "long.mp4"], "<image>": ["image.png"]}
    chat, media = [], []
    for role, said in turns:
        parts = []
        start = 0
        for match in text.PLACEHOLDER.finditer(said):
            parts.append({"type": "text", "text": said[start : match.start()]})
            kind = match.group()[1:-1]
            media.append(Media(kind, str(folder / pools[match.group()].pop())))
            parts.append({"type": kind, kind: media[-1].path})
            start = match.end()
        parts.append({"type": "text", "text": said[start:]})
        plain = len(parts) == 1
        chat.append({"role": role, "content": said if plain else parts})
    return chat, media


def ask(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "\nWhy?"}]}]


def located(part: dict, kind: str, folder: Path) -> dict:
    return {"type": kind} | part | {"path": str(folder / part["path"])}


def chat(folder: Path, messages: list, **options) -> tuple:
    defaults = dict(tokenize=True, return_dict=True, return_tensors="pt")
    prompt = {"add_generation_prompt": not options.get("return_assistant_tokens_mask")}
    return str(folder), "apply_chat_template", (messages,), defaults | prompt | options


def call(folder: Path, **options) -> tuple:
    return str(folder), "__call__", (), options


PROMPT = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
ONE = PROMPT.format("<video>\nWhy?")


def rendered_calls(folder: Path) -> dict[str, dict]:
    """Arguments of `processor(...)`, whose prompts are rendered already."""
    short, long = str(folder / "short.mp4"), str(folder / "long.mp4")
    pictures = [picture(number) for number in range(12)]
    mixed = PROMPT.format("<image> or <video>?")
    pt = dict(return_tensors="pt")
    return {
        "path": dict(text=ONE, videos=long) | pt,
        "bytes": dict(text=[ONE], videos=[Path(long).read_bytes()]) | pt,
        "clip of bytes": dict(
            text=ONE, videos={"video": Path(long).read_bytes(), "start": 0.7, "end": 2.2}
        )
        | pt,
        "frames": dict(text=ONE, videos=str(folder / "frames")) | pt,
        "array": dict(text=ONE, videos=np.stack(pictures)) | pt,
        "pictures": dict(text=ONE, videos=[Image.fromarray(image) for image in pictures]) | pt,
        "list of pictures": dict(text=ONE, videos=[pictures]) | pt,
        "image file": dict(text=PROMPT.format("<image>"), images=folder / "image.jpg") | pt,
        "image bytes": dict(
            text=PROMPT.format("<image>"), images=[(folder / "image.jpg").read_bytes()]
        )
        | pt,
        "flat": dict(text=[ONE, mixed], videos=[short, long], images=str(folder / "image.png"))
        | pt,
        "nested": dict(
            text=[ONE, mixed], videos=[[short], [long]], images=[[], [str(folder / "image.png")]]
        )
        | pt,
        "on the right": dict(text=[ONE, mixed], videos=[short, long], padding_side="right")
        | dict(images=str(folder / "image.png"))
        | pt,
        "lists": dict(text=["a", "abc"], padding=False),
    }


def mistakes(folder: Path) -> dict[str, tuple]:
    """What is called, and what the error must say."""
    short = str(folder / "short.mp4")
    float_video = np.zeros((2, 3, 8, 8), np.float32)

    def chatting(**part):
        return chat, dict(messages=ask(part))

    return {
        "missing file": (
            call, dict(text=ONE, videos="no.mp4"),
            ("MediaError", "no.mp4: cannot be opened: No such file or directory"),
        ),
        "broken file": (
            call, dict(text=ONE, videos=str(folder / "broken.mp4")),
            ("MediaError", "broken.mp4: cannot be opened: Invalid data"),
        ),
        "empty folder": (
            call, dict(text=ONE, videos=str(folder / "empty")),
            ("MediaError", "empty: is a folder without images"),
        ),
        "no frames": (
            call, dict(text=ONE, videos=np.zeros((0, 8, 8, 3), np.uint8)),
            ("MediaError", "video in memory: holds no frame"),
        ),
        "a clip behind the end": (
            *chatting(type="video", path=short, start=7.0),
            ("MediaError", "start=7 s is outside the video: the clip lasts 0.10 s"),
        ),
        "address": (
            *chatting(type="video", url="https://a.b/c.mp4"),
            ("MediaError", "https://a.b/c.mp4: is not a local path; download it first"),
        ),
        "too few": (
            call, dict(text=[ONE, ONE], videos=[short]),
            ("ValueError", "the texts hold 1 + 1 <video>, but 1 videos are given"),
        ),
        "too many": (
            call, dict(text=ONE, videos=[short], images=[str(folder / "image.png")]),
            ("ValueError", "the texts hold 0 <image>, but 1 images are given"),
        ),
        "in the wrong text": (
            call, dict(text=[ONE, "b"], videos=[[], [short]]),
            ("ValueError", "the texts hold 1 + 0 <video>, but 0 + 1 videos are given"),
        ),
        "spelled placeholder": (
            *chatting(type="text", text="a <video> b"),
            ("ValueError", "the text 'a <video> b' spells a placeholder"),
        ),
        "spelled video token": (
            call, dict(text="a <|video_pad|>"),
            ("ValueError", "spells <|video_pad|>, which marks visual tokens"),
        ),
        "part without a medium": (
            *chatting(type="video"),
            ("ValueError", "video part with 0 media: give one of video, path, url"),
        ),
        "unknown part": (
            *chatting(type="audio"), ("ValueError", "a part {'type': 'audio'}: type text"),
        ),
        "no messages": (chat, dict(messages=[]), ("ValueError", "no messages")),
        "no content": (
            chat, dict(messages=[{"role": "user"}]),
            ("ValueError", "a message whose content is None: a text or a list of parts"),
        ),
        "unknown role": (
            chat, dict(messages=[{"role": "tool", "content": "a"}]),
            ("ValueError", "a message of role 'tool'; known are system"),
        ),
        "medium of the system": (
            chat, dict(messages=[{"role": "system", "content": [{"type": "image", "path": "a"}]}]),
            ("ValueError", "image in a message of the system: only users show media"),
        ),
        "unknown field": (
            *chatting(type="video", path=short, nframes=3),
            ("ValueError", "unknown fields ['nframes']"),
        ),
        "unknown option": (
            chat, dict(messages=ask(), processor_kwargs={"size": 3}),
            ("TypeError", "unknown ['size']; known are ['fps'"),
        ),
        "float pixels": (
            call, dict(text=ONE, videos=float_video),
            ("ValueError", "float32 [3, 8, 8]: uint8 [H, W, 3] is read"),
        ),
        "two policies": (
            call, dict(text=ONE, videos=short, num_frames=3, fps=1.0),
            ("ValueError", "leave out max_frames and fps"),
        ),
        "turns out of order": (
            chat, dict(messages=[*ask(), *ask()]),
            ("TemplateError", "turns must alternate"),
        ),
        "tools": (chat, dict(messages=ask(), tools=[{}]), ("ValueError", "has no place for it")),
    }  # fmt: skip
