"""Trains STORM: `python -m storm_jax.train --config=configs/long.py --workdir=DIR`.

The same command on every host of a pod; after an interruption the same command again: it goes on
from the newest checkpoint in the workdir, with the same batches.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from storm_jax import checkpoint
from storm_jax.checkpoint import CheckpointError
from storm_jax.config import ConfigError, RunConfig, from_mapping, to_json
from storm_jax.data import pipeline
from storm_jax.data.records import RecordError
from storm_jax.data.sources import BadRecord, DataError, open_sources
from storm_jax.data.text import TokenizerError, load_tokenizer, vocabulary_needed
from storm_jax.flops import Work, peak_flops, training_flops
from storm_jax.interop.tokenizer_files import save_tokenizer
from storm_jax.metrics import MetricWriter, Progress, require_finite
from storm_jax.models.storm import PARTS, StormModel, count_parameters
from storm_jax.parallel import sharding
from storm_jax.parallel.checks import check_batch, check_divisible
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.evaluate import Score, evaluate
from storm_jax.training.optim import make_optimizer, trainable_parts
from storm_jax.training.state import TrainState, abstract_state, init_state
from storm_jax.training.step import make_eval_step, make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints and metrics go here.", required=True)

# Bad records are judged as a share once this many records have been read.
_JUDGED_AFTER = 100


def train(config: RunConfig, workdir: Path) -> dict[str, Score]:
    """Runs training to its end and returns the final scores by task."""
    # ------------------------------------------------------------------------- devices and workdir
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    check_divisible(config, mesh)
    _prepare(workdir, config)
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    _say(
        f"{jax.process_count()} process(es), {len(jax.devices())} device(s)"
        f" ({jax.devices()[0].device_kind}), mesh {sizes}"
    )

    # --------------------------------------------------------------------------------------- model
    model = StormModel(config.model)
    parts = trainable_parts(config.train.optimizer)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    abstract = abstract_state(model, optimizer, parts, mesh)
    for part in PARTS:
        if part in abstract.params:
            count = count_parameters(abstract.params[part])
            _say(f"  {part:<10} {count:>15,} parameters{'' if part in parts else ', frozen'}")
    frames = config.data.frames.max_frames
    _say(
        f"  {frames} frames are {frames * config.model.frame_tokens:,} tokens in the temporal"
        f" encoder and {config.model.visual_tokens(frames):,} in the decoder"
    )

    # --------------------------------------------------------------- where does the state come from
    # 1. this run's newest checkpoint, 2. parts of earlier runs, 3. random numbers
    checkpoints = checkpoint.Checkpoints(workdir, config.train.checkpoint)
    start_step = checkpoints.latest() or 0
    if start_step:
        state = checkpoints.restore(abstract, start_step)
        _say(f"resumed at step {start_step} from {checkpoints.folder}")
    else:
        state = init_state(model, optimizer, parts, mesh, config.train.seed)
        state = _init_from(config, state, abstract)

    # ---------------------------------------------------------------------------------------- data
    tokenizer = load_tokenizer(config.data.tokenizer)
    _check_vocabulary(config, vocabulary_needed(tokenizer, config.data.chat_template))
    if jax.process_index() == 0:
        save_tokenizer(tokenizer, workdir / "tokenizer")
    batches = pipeline.train_batches(
        config.data,
        config.model,
        tokenizer,
        batch=config.train.batch,
        steps=config.train.steps,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    bad_log = _BadRecords(workdir, config.data.max_bad_fraction)
    bad_log.log(batches.known_bad)  # `train_batches` has judged their share
    if start_step and checkpoints.fingerprint(start_step) != batches.fingerprint:
        logging.warning(
            "the data set or its layout differs from that of %s at step %d: batches from here on"
            " are not those of an uninterrupted run",
            checkpoints.folder,
            start_step,
        )
    evaluates = bool(config.train.eval_samples and config.data.eval)
    if evaluates:  # mistakes in the held-out set end the run now rather than after it
        open_sources("eval", config.data.eval, config.data, config.model, tokenizer)

    def place(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        def put(name: str, x: np.ndarray) -> jax.Array:
            shape = (config.train.batch, *x.shape[1:])
            layout = sharding.of_batch(name, shape, mesh)
            return jax.make_array_from_process_local_data(layout, x, shape)

        return {name: put(name, x) for name, x in arrays.items()}

    # ---------------------------------------------------------------------------------------- loop
    train_step = jax.jit(make_train_step(model, optimizer, config.train), donate_argnums=0)
    eval_step = jax.jit(make_eval_step(model))
    peak = peak_flops(jax.devices()[0].device_kind)
    # Rates are those of this process: its share of the batch on its share of the devices.
    progress = Progress(
        start_step, config.train.steps, None if peak is None else peak * jax.local_device_count()
    )
    writer = MetricWriter(workdir, start_step)
    scores: dict[str, Score] = {}

    def score(step: int) -> dict[str, Score]:
        held_out = pipeline.eval_batches(
            config.data,
            config.model,
            tokenizer,
            batch=config.train.batch,
            samples=config.train.eval_samples,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        bad_log.log(held_out.known_bad)

        def logged() -> Iterator[pipeline.Batch]:
            for batch in held_out:
                bad_log.log(batch.info.errors)
                yield batch

        result = evaluate(eval_step, state.params, logged(), place)
        writer.write(step, {f"eval/{k or 'all'}": s.accuracy for k, s in result.items()})
        return result

    with jax.set_mesh(mesh):
        iterator = iter(batches)
        pending = None
        for step in range(start_step + 1, config.train.steps + 1):
            began = time.perf_counter()
            batch = next(iterator)
            waited = time.perf_counter() - began
            bad_log.add(batch.info)
            if step == start_step + 1:
                _say("compiling the training step")
            state, metrics = train_step(state, place(batch.arrays))
            if step == start_step + 1:
                jax.block_until_ready(metrics)
                _say(f"compiled and ran the first step in {time.perf_counter() - began:.1f} s")
            # The numbers of a step are fetched while the next one runs.
            if pending is not None:
                _report(*pending, progress, writer, bad_log, config.train.log_every)
            work = Work.of(batch.arrays)
            flops = training_flops(config.model, work, parts)
            pending = (step, metrics, work, flops, waited)
            if step % config.train.checkpoint.every == 0 or step == config.train.steps:
                checkpoints.save(state, step, config, batches.fingerprint)
            if evaluates and config.train.eval_every and step % config.train.eval_every == 0:
                scores = score(step)
        if pending is not None:
            _report(*pending, progress, writer, bad_log, 1)
        progress.close()
        if evaluates:
            _say(f"evaluating on {config.train.eval_samples} held-out records")
            scores = score(config.train.steps)
    batches.close()
    checkpoints.close()
    writer.close()
    for line in score_table(scores):
        _say(line)
    return scores


# ------------------------------------------------------------------------------------- parts of it


def _report(step, metrics, work, flops, waited, progress, writer, bad_log, every) -> None:
    progress.add(work.tokens, work.frames, flops, waited)
    values = {name: float(value) for name, value in metrics.items()}
    require_finite(step, values)
    if step % every:
        return
    values.update(progress.rates())
    values["bad_records"] = bad_log.count
    writer.write(step, values)
    progress.show(values)


class _BadRecords:
    """Counts bad records, logs each once, and stops the run when they are too many."""

    def __init__(self, workdir: Path, max_fraction: float):
        self._path = workdir / "bad_records.jsonl"
        self._max_fraction = max_fraction
        # A run that goes on has listed some before.
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        listed = (json.loads(line) for line in lines)
        self._seen = {(record["source"], record["id"]) for record in listed}
        self._read = 0
        self._bad_read = 0

    @property
    def count(self) -> int:
        """Distinct bad records so far."""
        return len(self._seen)

    def add(self, info: pipeline.BatchInfo) -> None:
        """Records of one training batch."""
        self.log(info.errors)
        self._bad_read += len(info.errors)
        self._read += len(info.errors) + sum(map(len, info.rows))
        if self._read < _JUDGED_AFTER or self._bad_read <= self._max_fraction * self._read:
            return
        raise RuntimeError(
            f"{self._bad_read} of {self._read} records read so far are bad, more than"
            f" data.max_bad_fraction={self._max_fraction}; they are listed in {self._path}."
            " Mend the data (python -m storm_jax.data.validate FILE), or raise the limit"
        )

    def log(self, errors: tuple[BadRecord, ...]) -> None:
        """Lists what has not been listed yet, without judging how many there are."""
        for error in errors:
            if (error.source, error.id) not in self._seen:
                self._seen.add((error.source, error.id))
                logging.warning("bad record %s in %s: %s", error.id, error.source, error.reason)
                with self._path.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(error)) + "\n")


def _init_from(config: RunConfig, state: TrainState, abstract: TrainState) -> TrainState:
    """Takes parameters from earlier runs, part by part, where the config names them."""
    params = dict(state.params)
    for part in params:
        path = getattr(config.init_from, part) or config.init_from.all
        if path:
            params[part] = checkpoint.load_params(path, {part: abstract.params[part]})[part]
            _say(f"  {part} starts from {path}")
    return state._replace(params=params)


def _prepare(workdir: Path, config: RunConfig) -> None:
    """Makes the workdir and writes the resolved configuration into it."""
    if jax.process_index():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(to_json(config))
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be written ({error.strerror}); give a folder that this"
            " user may write to"
        ) from error


def _check_vocabulary(config: RunConfig, tokens: int) -> None:
    if tokens > config.model.decoder.vocab_size:
        raise ConfigError(
            f"tokenizer {config.data.tokenizer} has {tokens} tokens, the decoder only"
            f" model.decoder.vocab_size={config.model.decoder.vocab_size}"
        )


def score_table(scores: dict[str, Score]) -> list[str]:
    """One line a task: right answers, all answers, accuracy."""
    return [
        f"held-out accuracy  {task or 'all':<12} {s.accuracy:6.1%}  ({s.right} of {s.total})"
        for task, s in scores.items()
    ]


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments not understood: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    try:
        config = from_mapping(RunConfig, json.loads(_CONFIG.value.to_json_best_effort()))
        train(config, Path(_WORKDIR.value).expanduser())
    except (ConfigError, CheckpointError, DataError, RecordError, TokenizerError) as error:
        sys.exit(f"error: {error}")  # the user's to mend: no traceback


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    flags.mark_flag_as_required("config")
    app.run(main)
