"""Checkpoints: state, position in the data, configuration and layout version, saved together.

A workdir holds `checkpoints/<step>/`, written by Orbax in the background, and `tokenizer/`. The
position in the data is the step: every global batch follows from it (`data.pipeline`).

A checkpoint counts from the moment that it is whole. On a disk it is written under another name and
renamed; in a bucket, which cannot rename, a file `commit_success.txt` is written last. What a kill
leaves unfinished is never read, and the next run removes it.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp

from storm_jax.config import CheckpointConfig, RunConfig, from_mapping
from storm_jax.models.storm import Params
from storm_jax.training.state import TrainState
from storm_jax.workdir import location

_TOGETHER = 2**28  # bytes that `save_parameters` writes in one go: each takes a third of a second

LAYOUT = 1  # raised when the tree of parameters changes; older ones are then upgraded on reading


class CheckpointError(ValueError):
    """A checkpoint that is missing or does not fit; the message names it and the remedy."""


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them. Every process calls every method."""

    def __init__(self, workdir: str | os.PathLike, config: CheckpointConfig):
        """Makes the folder, and removes what a killed run left unfinished in it."""
        self.folder = location(workdir) / "checkpoints"
        policies = ocp.training
        self._orbax = ocp.training.Checkpointer(
            str(self.folder),
            # Orbax's own policies do not match its protocols of them.
            # pyrefly: ignore[bad-argument-type]
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            # pyrefly: ignore[bad-argument-type]
            preservation_policy=policies.preservation_policies.LatestN(config.keep),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        found = self._orbax.latest
        return None if found is None else found.step

    def save(self, state: TrainState, step: int, run: RunConfig, data_fingerprint: str) -> None:
        """Starts saving; returns when the arrays are copied from the devices.

        A save that is still going on is waited for first.

        Args:
          data_fingerprint: of the data set, which a resumed run compares (`data.pipeline.Batches`).

        Raises:
          CheckpointError: the previous one could not be written.
        """
        if self.latest() == step:
            return
        about: dict[str, Any] = {
            "layout": LAYOUT,
            "step": step,
            "config": dataclasses.asdict(run),
            "data_fingerprint": data_fingerprint,
        }
        with self._writing():
            self._orbax.save_checkpointables_async(step, {"state": state}, custom_metadata=about)

    def fingerprint(self, step: int) -> str:
        """The `data_fingerprint` that was saved with a step."""
        about = self._orbax.checkpointables_metadata(step).custom_metadata
        return cast(dict[str, Any], about)["data_fingerprint"]

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state at `step`, laid out as `abstract` says, which may be another mesh.

        Raises:
          CheckpointError: the checkpoint holds other parameters; the first difference is named.
        """
        where = f"checkpoint {self.folder / str(step)}"
        saved = self._orbax.checkpointables_metadata(step).metadata["state"]
        # Orbax names the fields of a NamedTuple; both sides as nested dicts.
        check_same(saved["params"], abstract.params, where)
        try:
            return self._orbax.load_checkpointables(step, {"state": abstract})["state"]
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{where} has another optimizer state than this run: train.optimizer.rates freezes"
                " other parts, or the optimizer changed. To start a new stage from its parameters,"
                " use another --workdir and --config.init_from"
            ) from error

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          CheckpointError: the last one could not be written.
        """
        with self._writing():
            self._orbax.close()

    @contextlib.contextmanager
    def closed_after(self, *errors: type[Exception]) -> Iterator[None]:
        """Finishes the save that is going on where the block ends with an error.

        Args:
          errors: that all processes raise at the same place. After any other one, a process that
            has company ends without the others, and the save cannot be finished.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, errors) or jax.process_count() == 1:
                self.close()
            raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # of files, TensorStore, Orbax
            raise CheckpointError(
                f"a checkpoint could not be written to {self.folder}: {error}. Those before it are"
                " whole; the same command goes on from the newest"
            ) from error


def save_params(workdir: str | os.PathLike, params: Params, run: RunConfig) -> Path:
    """Writes parameters alone, as step 0 of a new workdir; `load_params` reads them.

    Args:
      params: some parts or all of them.
      run: the configuration that they fit.

    Returns:
      The folder of the checkpoint.

    Raises:
      CheckpointError: there are checkpoints already.
    """
    return save_parameters(workdir, nnx.traversals.flatten_mapping(params, sep="/").items(), run)


def save_parameters(
    workdir: str | os.PathLike,
    parameters: Iterable[tuple[str, np.ndarray | jax.Array]],
    run: RunConfig,
) -> Path:
    """As `save_params`, from parameters that come one by one; each is written and let go.

    Memory holds one parameter, and small ones until they are `_TOGETHER` bytes. They are written
    whole and not compressed, straight from where they lie: compression made random weights 5 %
    smaller, took as much memory again and five times as long, and of chunks TensorStore kept
    copies, some of them until the end.

    Args:
      parameters: path ("vit/patch/weight") and value. An array of NumPy is not copied if it lies at
        a multiple of 64 bytes; it must not change afterwards.

    Raises:
      CheckpointError: there are checkpoints already. Nothing stays of one that breaks off.
    """
    folder = Path(workdir).absolute() / "checkpoints"
    if folder.exists():
        raise CheckpointError(f"{folder} exists; give a new folder")
    about: dict[str, Any] = {
        "layout": LAYOUT, "step": 0, "config": dataclasses.asdict(run), "data_fingerprint": "",
    }  # fmt: skip
    where = str(folder / "0")
    waiting: dict[str, jax.Array] = {}

    def write() -> None:
        # Orbax's own type of trees does not admit a dict of arrays.
        tree: Any = {"params": nnx.traversals.unflatten_mapping(waiting, sep="/")}
        ocp.partial.save(where, tree, custom_metadata=about)
        waiting.clear()
        del tree
        gc.collect()  # what Orbax makes of them refers to itself, and would keep them

    # (Files have no limit, else Orbax cuts parameters of more than 2 GB into chunks.)
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = 0
    try:
        with context:
            for path, value in parameters:
                waiting[path] = _on_host(value) if isinstance(value, np.ndarray) else value
                del value  # else it stays while the next one is made
                if sum(x.nbytes for x in waiting.values()) >= _TOGETHER:
                    write()
            if waiting:
                write()
            ocp.partial.finalize(where)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder / "0"


def _on_host(value: np.ndarray) -> jax.Array:
    """As an array of JAX on a CPU, if it has one here; of one of NumPy Orbax notes another type."""
    try:
        return jax.device_put(value, jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return jax.device_put(value)


def describe(path: str | os.PathLike) -> tuple[RunConfig, dict[str, tuple[tuple[int, ...], str]]]:
    """A checkpoint's configuration, and shape and dtype of its parameters by name."""
    folder, step = find(path)
    with ocp.training.Checkpointer(str(folder)) as orbax:
        saved = orbax.checkpointables_metadata(step).metadata["state"]["params"]
    leaves, _ = jax.tree_util.tree_flatten_with_path(saved)
    names = {"/".join(str(key.key) for key in where): x for where, x in leaves}
    return read_config(path), {n: (tuple(x.shape), str(x.dtype)) for n, x in names.items()}


def find(path: str | os.PathLike) -> tuple[epath.Path, int]:
    """The folder of checkpoints and the step that `path` names: a workdir, or one checkpoint in it.

    Raises:
      CheckpointError: there is no complete checkpoint.
    """
    path = location(path)
    if path.name.isdigit() and path.parent.name == "checkpoints":
        folder, step = path.parent, int(path.name)
    else:
        folder, step = path / "checkpoints", None
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint at {path}: give a training workdir, or one folder of its checkpoints/"
        )
    with ocp.training.Checkpointer(str(folder)) as orbax:
        steps = [c.step for c in orbax.checkpoints]
    if not steps or (step is not None and step not in steps):
        raise CheckpointError(f"no complete checkpoint at {path}; complete steps there: {steps}")
    return folder, max(steps) if step is None else step


def read_config(path: str | os.PathLike) -> RunConfig:
    """The configuration that a checkpoint was trained with."""
    folder, step = find(path)
    with ocp.training.Checkpointer(str(folder)) as orbax:
        about = orbax.checkpointables_metadata(step).custom_metadata
    if about["layout"] != LAYOUT:
        raise CheckpointError(
            f"checkpoint {folder / str(step)} has layout version {about['layout']}, this storm_jax"
            f" reads version {LAYOUT}"
        )
    return from_mapping(RunConfig, json.loads(json.dumps(about["config"])))


def load_params(path: str | os.PathLike, abstract: Params) -> Params:
    """Parameters alone, or the parts of them that `abstract` names.

    Args:
      path: a workdir (its newest checkpoint) or one checkpoint.
      abstract: shapes, dtypes and shardings; its first level may hold some parts only.

    Raises:
      CheckpointError: a parameter is missing or has another shape; the first one is named.
    """
    folder, step = find(path)
    with ocp.training.Checkpointer(str(folder)) as orbax:
        saved = orbax.checkpointables_metadata(step).metadata["state"]["params"]
        where = f"checkpoint {folder / str(step)}"
        missing = sorted(set(abstract) - set(saved))
        if missing:
            raise CheckpointError(
                f"{where} has no part {', '.join(missing)}, only {', '.join(sorted(saved))}; in"
                " place of --config.init_from name these, as --config.init_from."
                f"{min(saved)}={path}"
            )
        saved = {part: saved[part] for part in abstract}
        check_same(saved, abstract, where)
    with _partial_loading(_room_to_read(saved, abstract)):
        tree = {"params": abstract}
        where = str(folder / str(step))
        return ocp.load_checkpointables(where, {"state": tree})["state"]["params"]


def parameters(path: str | os.PathLike, names: Iterable[str]) -> Iterator[np.ndarray]:
    """Parameters one by one, as they are stored, on the host; only the one asked for is read.

    Args:
      path: a workdir (its newest checkpoint) or one checkpoint.
      names: of parameters that are there ("vit/patch/weight"), as `describe` spells them.
    """
    folder, step = find(path)
    with ocp.training.Checkpointer(str(folder)) as orbax:
        saved = orbax.checkpointables_metadata(step).metadata["state"]["params"]
    where = str(folder / str(step))
    with _partial_loading():
        for name in names:
            parts = ["params", *name.split("/")]
            found = functools.reduce(lambda tree, part: tree[part], parts[1:], saved)
            # Says shape and dtype, and takes no memory.
            wanted: Any = np.broadcast_to(np.zeros((), found.dtype), found.shape)
            for part in reversed(parts):
                wanted = {part: wanted}
            tree = ocp.load_checkpointables(where, {"state": wanted})["state"]
            found = functools.reduce(lambda tree, part: tree[part], parts, tree)
            del tree, wanted
            yield found
            del found  # else it stays while the next one is read


def _partial_loading(room: int | None = None) -> ocp.Context:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    context.memory.read_concurrent_bytes = room
    return context


def _room_to_read(saved: Any, wanted: Params) -> int:
    """Bytes that may be on their way to the devices at a time: those of the largest parameter.

    Without a limit, Orbax reads all of them at once. A limit must be above what one read takes:
    whole chunks, in the wanted dtype.
    """

    def size(stored: Any, x: Any) -> int:
        chunk = stored.storage_metadata.chunk_shape
        numbers = math.prod(-(-n // c) * c for n, c in zip(x.shape, chunk, strict=True))
        return numbers * max(np.dtype(stored.dtype).itemsize, np.dtype(x.dtype).itemsize)

    return max(jax.tree.leaves(jax.tree.map(size, saved, wanted))) + 1


def check_same(saved: Any, wanted: Any, where: str) -> None:
    """Compares two parameter trees by name and shape.

    Raises:
      CheckpointError: names the first parameter, in tree order, that differs.
    """
    have, want = (_flat(tree) for tree in (saved, wanted))
    for name in sorted(set(have) | set(want)):
        if name not in have:
            raise CheckpointError(f"{where} lacks parameter {name} {want[name]} of this model")
        if name not in want:
            raise CheckpointError(f"{where} has parameter {name} {have[name]}, this model has not")
        if have[name] != want[name]:
            raise CheckpointError(
                f"{where} is of another architecture: parameter {name} is {have[name]} there and"
                f" {want[name]} in this model"
            )


def _flat(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(key.key) for key in path): tuple(x.shape) for path, x in leaves}
