"""A tiny model of random parameters, behind a server."""

import dataclasses
from pathlib import Path

import jax
import pytest

from storm_jax.config import MeshConfig
from storm_jax.data import text
from storm_jax.inference.load import made_ready
from storm_jax.models.storm import StormModel
from storm_jax.parallel.mesh import make_mesh
from tests.data.media_files import write
from tests.inference.test_engine import perturbed
from tests.tiny import run_config, tiny_model


def tiny_run():
    """The tiny model, reading bytes."""
    model = tiny_model(
        vit=dict(layers=1), temporal=dict(layers=1), decoder=dict(vocab_size=text.BYTES_VOCAB)
    )
    run = run_config(**{"data.tokenizer": "bytes", "data.frames.max_frames": 8})
    return dataclasses.replace(run, model=model)


@pytest.fixture(scope="session")
def loaded():
    run = tiny_run()
    params = StormModel(run.model).init(jax.random.key(0))
    # As it is at first, the decoder would repeat one token, whatever was asked.
    params["decoder"] = perturbed(params["decoder"])
    return made_ready(run, params, make_mesh(MeshConfig(data=1), jax.devices()[:1]))


@pytest.fixture(scope="session")
def tokenizer():
    return text.load_tokenizer("bytes")


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """A folder that clients may name: clip.mp4, other.mp4, picture.png, frames/."""
    folder = tmp_path_factory.mktemp("allowed")
    write(folder / "clip.mp4", 30)
    write(folder / "other.mp4", 12, number=500)
    write(folder / "picture.png", 1, codec="png", format="image2", pix_fmt="rgb24", number=3)
    (folder / "frames").mkdir()
    for i in range(5):
        name = folder / "frames" / f"{i}.png"
        write(name, 1, codec="png", format="image2", pix_fmt="rgb24", number=i)
    return folder


@pytest.fixture(scope="session")
def served(loaded, tokenizer, media):
    from tests.serving.harness import SETTINGS, running  # which needs the web's packages

    settings = dataclasses.replace(SETTINGS, allowed_media_path=(str(media),))
    with running(loaded, tokenizer, settings) as found:
        yield found
