"""A grid point's training is that of `python -m storm_jax.train` on the same mp4 files.

All three stages of one seed are run twice. The command reads records and videos by its own
pipeline and starts at random, then from the checkpoint of the stage before. Its order of clips is
its own (`data.planning`) and can be given by nobody, but it says which records were in each step;
the grid's machinery is given that order for one of two seeds that train side by side. Compared are
the rows of every step to the last bit, and the losses and parameters of each stage.
"""

import dataclasses
import json
import os

import numpy as np
import pytest

from storm_jax import checkpoint
from storm_jax.config import DataConfig, InitConfig, RunConfig, SourceConfig
from storm_jax.data import pipeline
from storm_jax.evidence_grid import clips, seeds
from storm_jax.evidence_grid.point_run import PointRun
from storm_jax.evidence_grid.recipe import train_config
from storm_jax.frames import FrameConfig, ReductionConfig
from storm_jax.models.storm import StormModel
from tests.commands.conftest import Command

pytestmark = pytest.mark.slow

SEED, SEEDS = 1, 2
CONFIG = """
import json, pathlib
from ml_collections import ConfigDict


def get_config():
    fields = pathlib.Path(__file__).with_name("fields.json")
    return ConfigDict(json.loads(fields.read_text()))
"""


def write_records(path, data, folders):
    """One file of several data sets' records; the id of each is its place in the grid's arrays."""
    lines = []
    for folder in folders:
        with open(os.path.join(folder, "train.jsonl"), encoding="utf-8") as file:
            for record in map(json.loads, file):
                (medium,) = record["media"]
                medium["path"] = os.path.relpath(os.path.join(folder, medium["path"]), data)
                lines.append(json.dumps({**record, "id": str(len(lines))}) + "\n")
    path.write_text("".join(lines))


def trained(config, folder):
    """What the command leaves: losses, records of the steps, parameters, and its workdir."""
    (folder / "fields.json").write_text(json.dumps(dataclasses.asdict(config)))
    (folder / "config.py").write_text(CONFIG)
    workdir = folder / "run"
    command = Command("train", f"--config={folder / 'config.py'}", f"--workdir={workdir}")
    status, _, err = command.finish()
    assert status == 0, err
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    text = (workdir / "records-0.jsonl").read_text()
    order = np.array([json.loads(line)["rows"] for line in text.splitlines()]).astype(np.int32)
    params = checkpoint.load_params(str(workdir), StormModel(config.model).abstract())
    return losses, order[:, :, 0], params, str(workdir)


def test_the_command_trains_as_the_grid(recipe, data, tmp_path):
    run = PointRun(recipe, data, str(tmp_path), lambda _: None)
    every = list(clips.folders(data, recipe.videos))
    short = [folder for folder in every if "short" in os.path.basename(folder)]
    long = [folder for folder in every if folder not in short]
    assert short and len(long) > 1
    params, before = seeds.init_params(run.model, SEEDS), ""
    for number, stage in enumerate(recipe.stages()):
        first = number < 2
        part = run.short("train") if first else run.long("train")
        frames = recipe.videos.short_frames if first else recipe.point.frames
        model = run.config
        if number == 0:
            model = dataclasses.replace(model, reduction=ReductionConfig())
        length = run.length(part, config=model)
        rows = run.rows(part, model, length)

        # ------------------------------------------------------------------------- the command
        folder = tmp_path / f"stage{number}"
        folder.mkdir()
        write_records(folder / "train.jsonl", data, short if first else long)
        config = RunConfig(
            name="point",
            model=model,
            data=DataConfig(
                train=(SourceConfig(str(folder / "train.jsonl"), media_root=data),),
                eval=(),
                frames=FrameConfig(frames),
                tokenizer=os.path.join(every[0], "tokenizer"),
                chat_template="gemma",
                sequence_length=length,
                row_frames=frames,
                pack=False,
            ),
            train=dataclasses.replace(
                train_config(stage, SEED), log_every=1, log_records=True, eval_samples=0
            ),
            init_from=InitConfig(all=before),
        )
        losses, order, theirs, before = trained(config, folder)
        assert order.shape == (stage.steps, stage.batch)

        # ------------------------------------------------------------- the rows that it trained on
        with pipeline.train_batches(
            config.data, model, run.tokenizer, batch=stage.batch, steps=stage.steps
        ) as batches:
            for step, batch in enumerate(batches):
                ids = [[sample.id for sample in row] for row in batch.info.rows]
                assert ids == [[str(i)] for i in order[step]] and not batch.info.errors
                assert set(batch.arrays) == set(rows)
                for name, array in batch.arrays.items():
                    found = np.asarray(rows[name])[order[step]]
                    np.testing.assert_array_equal(array, found, err_msg=name)
                assert (batch.arrays["targets"] >= 0).any(axis=1).all()  # every row is asked

        # ------------------------------------------------------------------------ the grid's stage
        index = run.order(number, len(part.tasks))  # [steps, seeds, batch]
        assert (index[:, SEED] != order).any()
        index[:, SEED] = order
        chunk = seeds.make_train_chunk(StormModel(model), train_config(stage, 0))
        state, metrics = chunk(seeds.start(config.train, params), rows, index)
        params = state.params
        np.testing.assert_allclose(metrics["loss"][:, SEED], losses, rtol=2e-5)
        for name, many, one in _leaves(params, theirs):
            # A bias of all keys is nothing to a softmax: its gradient is rounding alone, which Adam
            # makes steps of. The others have moved by 2e-3 and more.
            if not name.endswith("key/bias"):
                np.testing.assert_allclose(many[SEED], one, rtol=1e-4, atol=2e-5, err_msg=name)


def _leaves(many, one, path=""):
    assert many.keys() == one.keys()
    for key in many:
        if isinstance(many[key], dict):
            yield from _leaves(many[key], one[key], f"{path}/{key}")
        else:
            yield f"{path}/{key}", np.asarray(many[key]), np.asarray(one[key])
