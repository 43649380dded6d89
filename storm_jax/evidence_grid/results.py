"""The folder of a grid: OUT/runs/NAME.json, written once each."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from storm_jax.evidence_grid.answers import Answers
from storm_jax.evidence_grid.recipe import (
    EvidenceError,
    Recipe,
    answers_name,
    described,
    difference,
)


@dataclass(frozen=True)
class Result:
    """What a grid point's file holds."""

    run: dict

    def answers(self, split: str, sampling: int = 1) -> Answers:
        """Right answers to a split, with every `sampling`-th pooled frame."""
        return Answers.from_json(self.run["answers"][answers_name(split, sampling)])


class Folder:
    """The results of one grid."""

    def __init__(self, out: str):
        self.path = Path(out)

    def _file(self, name: str) -> Path:
        return self.path / "runs" / f"{name}.json"

    def write(self, name: str, found: dict) -> None:
        """Writes a result; a kill leaves none or a whole one."""
        path = self._file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found) + "\n", encoding="utf-8")
        os.replace(part, path)

    def has(self, recipe: Recipe) -> bool:
        """Whether a point is done.

        Raises:
          EvidenceError: the file is of another recipe.
        """
        path = self._file(recipe.point.name)
        if not path.exists():
            return False
        found = json.loads(path.read_text(encoding="utf-8"))["recipe"]
        if found != described(recipe):
            raise EvidenceError(
                f"{path} is of another recipe: {difference(found, described(recipe))}."
                " Name another --out, or remove the file"
            )
        return True

    def read(self) -> dict[str, Result]:
        """All results by name.

        Raises:
          EvidenceError: there are none, or points were trained on different videos or budgets.
        """
        results = {}
        for path in sorted((self.path / "runs").glob("*.json")):
            results[path.stem] = Result(json.loads(path.read_text(encoding="utf-8")))
        if not results:
            raise EvidenceError(f"{self.path}/runs has no results; run the grid first")
        first = next(iter(results.values())).run
        for result in results.values():
            for key in ("videos", "sizes", "short", "reduced", "seeds"):
                if result.run["recipe"][key] != first["recipe"][key]:
                    raise EvidenceError(
                        f"{result.run['name']} and {first['name']} in {self.path} differ in"
                        f" {key}: {difference(result.run['recipe'][key], first['recipe'][key])}"
                    )
        return results
