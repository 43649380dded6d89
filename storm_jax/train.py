"""Trains STORM: `python -m storm_jax.train --config=configs/long.py --workdir=DIR`.

The same command on every host of a pod; after an interruption the same command again: it goes on
from the newest checkpoint in the workdir, with the same batches. Exit statuses: `training.exits`.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from storm_jax import checkpoint
from storm_jax.checkpoint import CheckpointError
from storm_jax.config import ConfigError, RunConfig, from_mapping, to_json
from storm_jax.config_arguments import spelled_out
from storm_jax.data import pipeline
from storm_jax.data.records import RecordError
from storm_jax.data.sources import DataError, open_sources
from storm_jax.data.text import TokenizerError, load_tokenizer, vocabulary_needed
from storm_jax.interop.tokenizer_files import save_tokenizer
from storm_jax.metrics import MetricWriter
from storm_jax.models.storm import PARTS, StormModel, count_parameters
from storm_jax.parallel import processes, sharding
from storm_jax.parallel.checks import check_batch, check_divisible
from storm_jax.parallel.identity import identity
from storm_jax.parallel.mesh import make_mesh
from storm_jax.parallel.same_rows import SameRows
from storm_jax.reporting import ROWS_DIFFER, BadRecords, RecordLog, Report
from storm_jax.training import compile_cache, exits, memory
from storm_jax.training.evaluate import Score, evaluate
from storm_jax.training.goodput import Goodput
from storm_jax.training.health import TrainingFailed
from storm_jax.training.optim import make_optimizer, trainable_parts
from storm_jax.training.preemption import Preempted, Preemption
from storm_jax.training.state import TrainState, abstract_state, init_state
from storm_jax.training.step import gradient_names, make_eval_step, make_train_step
from storm_jax.training.watchdog import Watchdog
from storm_jax.workdir import Workdir, location

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Checkpoints and metrics go here: a folder that all hosts share, or gs://."
)

MISTAKES = (ConfigError, CheckpointError, DataError, RecordError, TokenizerError)
"""The user's to mend: shown without a traceback."""


def train(config: RunConfig, workdir: str) -> dict[str, Score]:
    """Runs training to its end and returns the final scores by task.

    Raises:
      Preempted: SIGTERM came, and the state is saved.
      TrainingFailed, OutOfMemory, and MISTAKES: the message says what to do.
    """
    # ------------------------------------------------------------------------- devices and workdir
    watchdog = Watchdog(config.train.watchdog)
    clock = Goodput(time.time(), watchdog)
    if config.train.compile_cache:
        compile_cache.enable(str(location(workdir) / "compiled"))
    processes.start()
    _say(processes.describe())
    processes.require_same(
        identity(config, workdir), "Start all hosts with one command and one installation"
    )
    mesh = make_mesh(config.mesh)
    _say("mesh " + " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items()))
    check_batch(config, mesh)
    check_divisible(config, mesh)
    preemption = Preemption(mesh, config.train.preemption_grace)
    folder = Workdir(workdir)

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
    checkpoints = checkpoint.Checkpoints(folder.path, config.train.checkpoint)
    start_step = checkpoints.latest() or 0
    processes.require_same(
        {"newest checkpoint": str(start_step)}, f"Does every host see {checkpoints.folder}?"
    )
    with memory.explained("making the training state", config, activations=False):
        if start_step:
            state = checkpoints.restore(abstract, start_step)
            _say(f"resumed at step {start_step} from {checkpoints.folder}")
        else:
            state = init_state(model, optimizer, parts, mesh, config.train.seed)
            state = _init_from(config, state, abstract)
        jax.block_until_ready(state)

    # ---------------------------------------------------------------------------------------- data
    layout = sharding.named(("batch",), (config.train.batch,), mesh)
    share = processes.share_of(layout, config.train.batch)
    shares_rows = jax.process_count() > share.count
    same_rows = SameRows(layout, config.train.batch) if shares_rows else None
    with processes.together(*MISTAKES, OSError):
        tokenizer = load_tokenizer(config.data.tokenizer)
        _check_vocabulary(config, vocabulary_needed(tokenizer, config.data.chat_template))
        if jax.process_index() == 0:
            folder.write("config.json", to_json(config))
            save_tokenizer(tokenizer, folder.local / "tokenizer")
            folder.sync()
        batches = pipeline.train_batches(
            config.data,
            config.model,
            tokenizer,
            batch=config.train.batch,
            steps=config.train.steps,
            start_step=start_step,
            share_index=share.index,
            share_count=share.count,
        )
        evaluates = bool(config.train.eval_samples and config.data.eval)
        if evaluates:  # mistakes in the held-out set end the run now rather than after it
            open_sources("eval", config.data.eval, config.data, config.model, tokenizer)
    processes.require_same(
        {"fingerprint of the training data": batches.fingerprint},
        "Every host must see the same files",
    )
    bad_records = BadRecords(folder.local, config.data.max_bad_fraction)
    bad_records.log(batches.known_bad)  # `train_batches` has judged their share
    if start_step and checkpoints.fingerprint(start_step) != batches.fingerprint:
        logging.warning(
            "the data set or its layout differs from that of %s at step %d: batches from here on"
            " are not those of an uninterrupted run",
            checkpoints.folder,
            start_step,
        )

    def place(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        def put(name: str, x: np.ndarray) -> jax.Array:
            shape = (config.train.batch, *x.shape[1:])
            layout = sharding.of_batch(name, shape, mesh)
            return jax.make_array_from_process_local_data(layout, x, shape)

        return {name: put(name, x) for name, x in arrays.items()}

    # ---------------------------------------------------------------------------------------- loop
    train_step = processes.CompiledTogether(
        jax.jit(make_train_step(model, optimizer, config.train), donate_argnums=0), "train step"
    )
    eval_step = processes.CompiledTogether(jax.jit(make_eval_step(model)), "evaluation step")
    writer = MetricWriter(folder.local, start_step)
    clock.resume(writer.kept, writer.last)
    writer.write(start_step, clock.row())
    report = Report(
        config, parts, gradient_names(abstract.params, parts), writer, bad_records, start_step
    )
    record_log = RecordLog(folder.local, config.train.log_records)
    scores: dict[str, Score] = {}

    def score(step: int) -> dict[str, Score]:
        held_out = pipeline.eval_batches(
            config.data,
            config.model,
            tokenizer,
            batch=config.train.batch,
            samples=config.train.eval_samples,
            share_index=share.index,
            share_count=share.count,
        )
        bad_records.log(held_out.known_bad)

        def watched() -> Iterator[pipeline.Batch]:
            for number, batch in enumerate(held_out):
                clock.enter("evaluate", f"batch {number} of the evaluation after step {step}")
                bad_records.log(batch.info.errors)
                yield batch

        clock.enter("evaluate", f"the evaluation after step {step}", ends=False)  # compiles
        result = evaluate(eval_step, state.params, watched(), place, counts=share.leads)
        writer.write(step, {f"eval/{k or 'all'}": s.accuracy for k, s in result.items()})
        return result

    def save(step: int) -> None:
        report.flush()  # judges the step: a state that is lost is not saved
        clock.enter("checkpoint", f"the checkpoint of step {step} to begin")
        checkpoints.save(state, step, config, batches.fingerprint)
        writer.write(step, clock.row())
        folder.sync()

    iterator = iter(batches)
    first = start_step + 1
    with (
        checkpoints.closed_after(TrainingFailed),
        memory.explained("training", config),
        jax.set_mesh(mesh),
    ):
        for step in range(first, config.train.steps + 1):
            clock.enter("data", f"the batch of step {step}")
            began = time.perf_counter()
            batch = next(iterator)
            waited = time.perf_counter() - began
            record_log.add(step, batch.info)
            if step == first:
                clock.enter("compile", "the compiler", ends=False)
                _say("compiling the training step")
            else:
                clock.enter("step", f"step {step - 1} to finish on the devices")
            state, metrics = train_step(state, place(batch.arrays))
            if same_rows is not None:
                ids = [[sample.id for sample in row] for row in batch.info.rows]
                metrics[ROWS_DIFFER] = same_rows.differing(ids)
            if step == first:
                jax.block_until_ready(metrics)
                _say(f"compiled and ran the first step in {time.perf_counter() - began:.1f} s")
            # The numbers of the step before are fetched while this one runs.
            report.add(step, batch, metrics, waited)
            stops = preemption.agreed()
            if stops or step % config.train.checkpoint.every == 0 or step == config.train.steps:
                save(step)
            if stops and step < config.train.steps:
                clock.enter("checkpoint", f"the checkpoint of step {step} to be written")
                checkpoints.close()
                report.close()
                raise Preempted(f"stopped after step {step}, which is saved in {folder.path}")
            if evaluates and config.train.eval_every and step % config.train.eval_every == 0:
                scores = score(step)
        report.close()
        if evaluates:
            _say(f"evaluating on {config.train.eval_samples} held-out records")
            scores = score(config.train.steps)

    # ----------------------------------------------------------------------------------------- end
    batches.close()
    clock.enter("checkpoint", "the last checkpoint to be written")
    checkpoints.close()
    writer.write(config.train.steps, clock.row())
    writer.close()
    record_log.close()
    folder.close()
    preemption.close()
    watchdog.close()
    for line in score_table(scores):
        _say(line)
    _say(clock.line())
    return scores


# ------------------------------------------------------------------------------------- parts of it


def _init_from(config: RunConfig, state: TrainState, abstract: TrainState) -> TrainState:
    """Takes parameters from earlier runs, part by part, where the config names them."""
    params = dict(state.params)
    for part in params:
        path = getattr(config.init_from, part) or config.init_from.all
        if path:
            params[part] = checkpoint.load_params(path, {part: abstract.params[part]})[part]
            _say(f"  {part} starts from {path}")
    return state._replace(params=params)


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
        if not _WORKDIR.value:
            raise ConfigError("--workdir is missing: a folder that all hosts share, or gs://...")
        train(config, _WORKDIR.value)
    except Preempted as stop:
        _say(f"{stop}; the same command goes on from there")
        processes.leave(exits.PREEMPTED)
    except (*MISTAKES, TrainingFailed, memory.OutOfMemory) as error:
        print(f"error: {error}", file=sys.stderr)
        processes.leave(exits.MISTAKE)
    except Exception:  # shown whole; Python's own way out would wait for the other processes
        traceback.print_exc()
        processes.leave(exits.MISTAKE)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    flags.mark_flag_as_required("config")
    sys.argv[:] = spelled_out(sys.argv)
    app.run(main)
