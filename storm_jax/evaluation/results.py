"""Files of an evaluation: answers as they come, and the result when all are there.

OUT/TASK/recipe.json            what the answers depend on, written before the first one
OUT/TASK/samples-00000.jsonl    answers of process 0 in the order in which they came, while it runs
OUT/TASK/samples.jsonl          all answers in the order of the annotations, when all are there
OUT/TASK/result.json            scores, recipe, health, cost

A line is written as a whole; one that a kill cut off is forgotten. Nothing in an answer depends on
time or order, so that a run which was killed and started again writes the same samples.jsonl as one
that was not.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from storm_jax.evaluation.recipe import differences
from storm_jax.workdir import replace_text


class ResultError(ValueError):
    """A folder of results that cannot be used; the message names it, the fault and the remedy."""


class Samples:
    """The answers of one task in a folder, written by one of several processes.

    Attributes:
      answered: records by the id of their item, those of all processes, as of the start.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], process: int = 0):
        """Makes the folder, or goes on with what is there.

        Raises:
          ResultError: its answers were made by another recipe (the fields are named), a file in it
            is damaged, or a process of the same number is at work there.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        _agree(folder, recipe)
        self._path = folder / f"samples-{process:05d}.jsonl"
        self._file = self._path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResultError(
                f"{self._path}: another process is writing it; give each its own --process, or"
                " another --out"
            ) from error
        whole = self._path.read_bytes().rpartition(b"\n")
        self._file.truncate(len(whole[0] + whole[1]))
        self.answered = self._read()

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes an answer, which has an "id"."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits for other processes that are in here; of two that end together one goes first."""
        with (self.folder / "recipe.json").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def merged(self, ids: Sequence[str]) -> list[dict[str, Any]] | None:
        """All answers in the order of `ids`, which samples.jsonl then holds; None: some lack."""
        found = self._read()
        if any(id_ not in found for id_ in ids):
            return None
        records = [found[id_] for id_ in ids]
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        replace_text(self.folder / "samples.jsonl", "".join(lines))
        for part in self.folder.glob("samples-*.jsonl"):
            part.unlink(missing_ok=True)
        return records

    def forget(self, ids: Sequence[str]) -> None:
        """Drops answers, which are to be asked again; only while no other process is at work."""
        kept = [r for id_, r in self._read().items() if id_ not in set(ids)]
        for part in self.folder.glob("samples-*.jsonl"):
            if part != self._path:
                part.unlink()
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        replace_text(self.folder / "samples.jsonl", "".join(lines))
        self._file.truncate(0)
        self.answered = self._read()

    def close(self) -> None:
        """Closes the file; nothing is lost without it."""
        if not os.fstat(self._file.fileno()).st_size:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _read(self) -> dict[str, dict[str, Any]]:
        # Parts first: what another process merges meanwhile is in samples.jsonl before they go.
        found: dict[str, dict[str, Any]] = {}
        for path in [*sorted(self.folder.glob("samples-*.jsonl")), self.folder / "samples.jsonl"]:
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            lines = content.rpartition(b"\n")[0].split(b"\n") if content else []
            for number, line in enumerate(filter(None, lines), 1):
                try:
                    record = json.loads(line)
                    found[record["id"]] = record
                except (ValueError, KeyError, TypeError) as error:
                    raise ResultError(
                        f"{path}:{number} is no answer ({error}): the file is damaged; remove the"
                        " line to have its question asked again"
                    ) from error
        return found


def _agree(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Writes the recipe, or compares it with the one that is there."""
    path = folder / "recipe.json"
    if not path.exists():
        if any(folder.glob("samples*.jsonl")):
            raise ResultError(f"{folder} holds answers, but no recipe.json; give another --out")
        new = path.with_name(f".recipe.{os.getpid()}.{os.urandom(4).hex()}")
        new.write_text(json.dumps(recipe, indent=1) + "\n")
        try:
            os.link(new, path)  # unlike a rename it fails where another process was faster
        except FileExistsError:
            pass
        finally:
            new.unlink()
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise ResultError(f"{path} is not JSON ({error}); give another --out") from error
    # As JSON has it: tuples are lists there.
    if differing := differences(there, json.loads(json.dumps(recipe))):
        raise ResultError(
            f"{folder} holds answers of another recipe; give another --out. They differ in\n"
            + "\n".join(f"  {line}" for line in differing)
        )


def read_result(folder: Path) -> dict[str, Any] | None:
    """What OUT/TASK/result.json holds; None: there is none."""
    try:
        return json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return None


def write_result(folder: Path, result: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Writes result.json, and further files (submissions), their text by name."""
    for name, text in files.items():
        replace_text(folder / name, text)
    replace_text(folder / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
