"""The processor of an export, in a process without storm_jax, against our own pipeline."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from storm_jax.data import synthetic, text, video
from storm_jax.data.conversation import Media, Turn
from storm_jax.frames import FrameConfig
from storm_jax.interop import processor_export
from storm_jax.interop.processor_export import write_processor
from storm_jax.interop.tokenizer_files import save_tokenizer
from storm_jax.models.vit import normalise
from tests.data.media_files import picture, write
from tests.tiny import run_config

pytest.importorskip("torch")

H264 = {"g": "12", "bf": "3", "preset": "veryfast"}
SIZE = 32
CONFIGS = {
    "gemma": run_config(
        **{
            "data.chat_template": "gemma",
            "model.reduction.temporal_pool": 2,
            "model.reduction.temporal_sampling": 2,
        }
    ),
    "qwen2": run_config(
        **{
            "data.chat_template": "qwen2",
            "data.frames.fps": 2.0,
            "data.frames.keyframes_only": True,
            "model.reduction.spatial_pool": 1,
        }
    ),
}


# ------------------------------------------------------------------------------ running an export


def run(tmp_path: Path, calls: dict) -> dict:
    """Results of all calls, from one fresh process; `exported.py` says of what form."""
    (tmp_path / "calls").write_bytes(pickle.dumps(calls))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("exported.py"), "calls", "results"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return pickle.loads((tmp_path / "results").read_bytes())


def chat(folder: Path, messages: list, **options) -> tuple:
    defaults = dict(tokenize=True, return_dict=True, return_tensors="pt")
    prompt = {"add_generation_prompt": not options.get("return_assistant_tokens_mask")}
    return str(folder), "apply_chat_template", (messages,), defaults | prompt | options


def call(folder: Path, **options) -> tuple:
    return str(folder), "__call__", (), options


def arrays(result) -> dict[str, np.ndarray]:
    assert isinstance(result, dict), result
    assert {kind for kind, _ in result.values()} == {"Tensor"}
    return {name: value for name, (_, value) in result.items()}


# ------------------------------------------------------------------------------------ our pipeline


def ours(name: str, turns: list[Turn], media: list[Media], policy: FrameConfig | None = None):
    """Token ids (VISUAL = -1) and frames (uint8, one array a medium) of a prompt."""
    config = CONFIGS[name]
    policy = policy or config.data.frames
    frames = [video.sample(m, policy, SIZE)[0] for m in media]
    counts = [config.model.visual_tokens(len(own)) for own in frames]
    tokenizer = text.load_tokenizer("bytes")
    return text.encode_prompt(tokenizer, config.data.chat_template, turns, counts), frames


def pixels(frames: list[np.ndarray]) -> np.ndarray:
    """What our ViT sees: the function of models/vit.py, compiled as it is there."""
    normalised = np.asarray(jax.jit(normalise)(np.concatenate(frames)))
    return normalised.transpose(0, 3, 1, 2)


def check(result, expected: list[tuple[np.ndarray, list[np.ndarray]]], video_token: int) -> None:
    """Compares the outputs for a batch with our tokens and frames of each row, bit for bit."""
    got = arrays(result)
    rows = zip(got["input_ids"], got["attention_mask"], expected, strict=True)
    for ids, mask, (tokens, _) in rows:
        missing = len(ids) - len(tokens)
        assert mask.tolist() == [0] * missing + [1] * len(tokens)
        assert np.where(ids == video_token, -1, ids)[missing:].tolist() == tokens.tolist()
    assert got["input_ids"].dtype == got["attention_mask"].dtype == np.int64
    frames = [own for _, media in expected for own in media]
    if not frames:
        assert set(got) == {"input_ids", "attention_mask"}
        return
    assert got["frame_counts"].dtype == np.int64
    assert got["frame_counts"].tolist() == [len(own) for own in frames]
    assert got["pixel_values_videos"].dtype == np.float32
    np.testing.assert_array_equal(got["pixel_values_videos"], pixels(frames))


# ------------------------------------------------------------------------------------------- cases


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """A folder with videos, images and a folder of frames."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    synthetic.write_video(str(folder / "synthetic.mp4"), synthetic_frames(rng))
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
    return folder


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


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for name, config in CONFIGS.items():
        folders[name] = tmp_path_factory.mktemp("exports") / name
        assert write_processor(config, "bytes", folders[name]) == text.BYTES_VOCAB
    return folders


@pytest.fixture(scope="module")
def results(tmp_path_factory, exports, media):
    """Everything that these tests ask of the exports, in one process."""
    calls = {}
    for name, folder in exports.items():
        for kind, table in (("video", VIDEOS), ("image", IMAGES)):
            for case, part in table.items():
                calls[name, case] = chat(folder, ask(located(part, kind, media)))
        for case, (options, _) in POLICIES.items():
            part = located(VIDEOS["long"], "video", media)
            calls[name, case] = chat(folder, ask(part), **options)
        for case, turns in CHATS.items():
            chat_messages, _ = messages(turns, media)
            calls[name, case] = chat(folder, chat_messages)
            calls[name, case, "rendered"] = chat(folder, chat_messages, tokenize=False)
            whole = [*chat_messages, {"role": "assistant", "content": "So."}]
            mask = dict(return_assistant_tokens_mask=True)
            calls[name, case, "whole"] = chat(folder, whole, **mask)
        batch = [messages(CHATS[case], media)[0] for case in ("text only", "several turns")]
        batch.append(ask(located(VIDEOS["clip"], "video", media)))
        calls[name, "batch"] = chat(folder, batch)
    for case, options in rendered_calls(media).items():
        calls[case] = call(exports["gemma"], **options)
    for case, (method, options, _) in mistakes(media).items():
        calls[case] = method(exports["gemma"], **options)

    part = ask(located(VIDEOS["clip"], "video", media))
    pictures = [picture(number) for number in range(12)]
    calls["array part"] = chat(
        exports["gemma"],
        [ask({"type": "video", "video": np.stack(pictures)})]
        + [ask({"type": "image", "image": Image.fromarray(pictures[5])})],
    )
    own = "{% for m in messages %}[{{ m['content'][0]['type'] }}] <video>{% endfor %}"
    calls["own template"] = chat(exports["gemma"], part, chat_template=own)
    copy = exports["gemma"].parent / "copy"
    calls["save"] = str(exports["gemma"]), "save_pretrained", (str(copy),), {}
    calls["saved"] = chat(copy, part)
    return run(tmp_path_factory.mktemp("run"), calls)


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


TEMPLATES = pytest.mark.parametrize("name", CONFIGS)


@TEMPLATES
@pytest.mark.parametrize("case", [*VIDEOS, *IMAGES])
def test_media_as_ours(results, media, name, case):
    kind = "image" if case in IMAGES else "video"
    part = (VIDEOS | IMAGES)[case]
    medium = Media(kind, str(media / part["path"]), part.get("start"), part.get("end"))
    expected = ours(name, [Turn("user", f"<{kind}>\nWhy?")], [medium])
    check(results[name, case], [expected], text.BYTES_VOCAB)


@TEMPLATES
@pytest.mark.parametrize("case", POLICIES)
def test_frame_policies_of_a_call(results, media, name, case):
    policy = POLICIES[case][1](CONFIGS[name].data.frames)
    medium = Media("video", str(media / "long.mp4"))
    expected = ours(name, [Turn("user", "<video>\nWhy?")], [medium], policy)
    check(results[name, case], [expected], text.BYTES_VOCAB)


@TEMPLATES
@pytest.mark.parametrize("case", CHATS)
def test_chats_as_ours(results, media, name, case):
    said = [Turn(role, content) for role, content in CHATS[case]]
    expected = ours(name, said, messages(CHATS[case], media)[1])
    check(results[name, case], [expected], text.BYTES_VOCAB)


@TEMPLATES
@pytest.mark.parametrize("case", CHATS)
def test_jinja_template_renders_our_text(results, name, case):
    said = [Turn(role, content) for role, content in CHATS[case]]
    template = CONFIGS[name].data.chat_template
    assert results[name, case, "rendered"] == text.spelled(template, said, prompt=True)


@TEMPLATES
@pytest.mark.parametrize("case", CHATS)
def test_masks_of_what_is_learnt(results, media, name, case):
    got = arrays(results[name, case, "whole"])
    frames = ours(name, [Turn(*turn) for turn in CHATS[case]], messages(CHATS[case], media)[1])[1]
    config = CONFIGS[name]
    expected = text.encode(
        text.load_tokenizer("bytes"),
        config.data.chat_template,
        [*(Turn(*turn) for turn in CHATS[case]), Turn("assistant", "So.")],
        [config.model.visual_tokens(len(own)) for own in frames],
    )
    assert got["assistant_masks"].tolist() == [expected.loss.tolist()]
    ids = np.where(expected.tokens == -1, text.BYTES_VOCAB, expected.tokens)
    assert got["input_ids"].tolist() == [ids.tolist()]


@TEMPLATES
def test_batch_of_different_videos(results, media, name):
    rows = []
    for case in ("text only", "several turns"):
        said = [Turn(*turn) for turn in CHATS[case]]
        rows.append(ours(name, said, messages(CHATS[case], media)[1]))
    clip = Media("video", str(media / "long.mp4"), 0.7, 2.2)
    rows.append(ours(name, [Turn("user", "<video>\nWhy?")], [clip]))
    check(results[name, "batch"], rows, text.BYTES_VOCAB)


def test_rendered_prompts(results, media):
    short, long = (Media("video", str(media / name)) for name in ("short.mp4", "long.mp4"))
    folder = Media("video", str(media / "frames"))
    images = {name: Media("image", str(media / name)) for name in ("image.png", "image.jpg")}

    def expect(content, *its_media):
        return ours("gemma", [Turn("user", content)], list(its_media))

    one = "<video>\nWhy?"
    for case, medium in {
        "path": long,
        "bytes": long,
        "clip of bytes": dataclasses.replace(long, start=0.7, end=2.2),
        "frames": folder,
        "array": folder,
        "pictures": folder,
        "list of pictures": folder,
    }.items():
        check(results[case], [expect(one, medium)], text.BYTES_VOCAB)
    for case in ("image file", "image bytes"):
        check(results[case], [expect("<image>", images["image.jpg"])], text.BYTES_VOCAB)
    batch = [expect(one, short), expect("<image> or <video>?", images["image.png"], long)]
    for case in ("flat", "nested"):
        check(results[case], batch, text.BYTES_VOCAB)


def test_pictures_as_parts_of_a_chat(results, media):
    said = [Turn("user", "<video>\nWhy?")]
    folder = ours("gemma", said, [Media("video", str(media / "frames"))])
    image = ours("gemma", said, [Media("image", str(media / "image.png"))])
    check(results["array part"], [folder, image], text.BYTES_VOCAB)


def test_padding(results):
    left, right = arrays(results["flat"]), arrays(results["on the right"])
    lengths = left["attention_mask"].sum(1)
    assert lengths[0] != lengths[1]
    for i, length in enumerate(lengths):
        assert right["attention_mask"][i].tolist() == sorted(left["attention_mask"][i])[::-1]
        np.testing.assert_array_equal(
            right["input_ids"][i, :length],
            left["input_ids"][i][len(left["input_ids"][i]) - length :],
        )
    np.testing.assert_array_equal(left["pixel_values_videos"], right["pixel_values_videos"])
    lists = {name: value for name, (_, value) in results["lists"].items()}
    assert lists == {"input_ids": [[97], [97, 98, 99]], "attention_mask": [[1], [1, 1, 1]]}


def test_mistakes_are_named(results, media):
    for case, (_, _, (kind, message)) in mistakes(media).items():
        got = results[case]
        assert isinstance(got, tuple), f"{case}: no error"
        assert got[0] == kind and message in got[1], f"{case}: {got}"


def test_own_template_decides_the_text(results):
    ids = arrays(results["own template"])["input_ids"][0]
    assert bytes(ids[ids < 256].tolist()) == b"[video] "
    assert (ids == text.BYTES_VOCAB).sum() == CONFIGS["gemma"].model.visual_tokens(8)


def test_saved_again_it_is_the_same(results, exports):
    first, again = arrays(results["gemma", "clip"]), arrays(results["saved"])
    assert set(first) == set(again)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    shipped = {path.name for path in exports["gemma"].glob("*.py")}
    assert {path.name for path in (exports["gemma"].parent / "copy").glob("*.py")} == shipped


def test_what_is_shipped(exports):
    folder = exports["gemma"]
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < names
    assert "processor_config.json" in names and not [n for n in names if n.endswith(".bin")]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["padding_side"] == "left" and settings["processor_class"] == "StormProcessor"
    with pytest.raises(AssertionError, match="from storm_jax import data: only"):
        processor_export.relative("import os\nfrom storm_jax import data\n")


# Of the published tokenizers; the folders' own chat templates have no place for videos.
PUBLISHED = {"gemma": ("gemma3", "<image_soft_token>"), "qwen2": ("qwen3", "<|video_pad|>")}


@pytest.mark.slow
@pytest.mark.network
@TEMPLATES
def test_published_tokenizers(published, media, tmp_path, name):
    package, video_token = PUBLISHED[name]
    source = tmp_path / "source"
    shutil.copytree(published[package], source)
    (source / "generation_config.json").write_text('{"temperature": 0.7}')
    original = text.load_tokenizer(str(source))
    save_tokenizer(original, tmp_path / "imported")
    save_tokenizer(text.load_tokenizer(str(tmp_path / "imported")), tmp_path / "trained")
    for file in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "trained" / file).read_bytes() == (source / file).read_bytes()
    travelled = text.load_tokenizer(str(tmp_path / "trained"))
    assert travelled.chat_template == original.chat_template
    assert travelled.added_tokens_decoder == original.added_tokens_decoder
    assert travelled.special_tokens_map == original.special_tokens_map

    config, export = CONFIGS[name], tmp_path / "export"
    token = write_processor(config, str(tmp_path / "trained"), export)
    assert token == original.convert_tokens_to_ids(video_token)
    calls, expected = {}, {}
    template = config.data.chat_template
    for case, said in CHATS.items():
        chat_messages, its_media = messages(said, media)
        turns = [Turn(*turn) for turn in said]
        calls[case] = chat(export, chat_messages)
        frames = ours(name, turns, its_media)[1]
        counts = [config.model.visual_tokens(len(own)) for own in frames]
        expected[case] = text.encode_prompt(original, template, turns, counts), frames
        kinds = {kind: [m.path for m in its_media if m.kind == kind] for kind in ("video", "image")}
        calls["rendered", case] = call(
            export,
            text=text.spelled(template, turns, prompt=True),
            videos=kinds["video"],
            images=kinds["image"],
            return_tensors="pt",
        )
    results = run(tmp_path, calls)
    for case in CHATS:
        check(results[case], [expected[case]], token)
    for case in list(CHATS)[:4]:  # the last two need the turns
        check(results["rendered", case], [expected[case]], token)
