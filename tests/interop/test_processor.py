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

from storm_jax.data import text, video
from storm_jax.data.conversation import Media, Turn
from storm_jax.frames import FrameConfig
from storm_jax.interop import processor_export
from storm_jax.interop.processor_export import write_processor
from storm_jax.interop.tokenizer_files import save_tokenizer
from storm_jax.models.vit import normalise
from tests.data.media_files import picture
from tests.interop.processor_cases import (
    CHATS,
    IMAGES,
    POLICIES,
    VIDEOS,
    ask,
    call,
    chat,
    located,
    messages,
    mistakes,
    rendered_calls,
    write_media,
)
from tests.tiny import run_config

pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

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
            "model.projector.shuffle": 1,
            "model.reduction.spatial_pool": 2,  # 4 tokens of a pooled frame
        }
    ),
}


# ------------------------------------------------------------------------------ running an export


def run(tmp_path: Path, calls: dict) -> dict:
    """Results of all calls, from one fresh process; `processor_calls.py` says of what form."""
    (tmp_path / "calls").write_bytes(pickle.dumps(calls))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("processor_calls.py"), "calls", "results"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return pickle.loads((tmp_path / "results").read_bytes())


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
    folder = tmp_path_factory.mktemp("media")
    write_media(folder)
    return folder


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
    calls["own template, masks"] = chat(
        exports["gemma"], part, chat_template=own, return_assistant_tokens_mask=True
    )
    copy = exports["gemma"].parent / "copy"
    calls["save"] = str(exports["gemma"]), "save_pretrained", (str(copy),), {}
    calls["saved"] = chat(copy, part)
    return run(tmp_path_factory.mktemp("run"), calls)


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
    kind, message = results["own template, masks"]
    assert kind == "ValueError" and "the model's own chat template only" in message


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
    if name == "gemma":  # the published text models have 262144 embeddings
        assert token == text.vocabulary_needed(original, "gemma") == 262144
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
