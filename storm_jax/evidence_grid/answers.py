"""Which answers of which seeds were right: what a grid point leaves behind."""

import base64
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Answers:
    """Answers of all seeds to one split.

    Attributes:
      right: bool [K, N], seeds by clips.
      tasks: family and scale of each clip.
      chance: float [N], one over the number of options.
      visual_tokens: of a clip, that reached the decoder.
    """

    right: np.ndarray
    tasks: tuple[str, ...]
    chance: np.ndarray
    visual_tokens: int

    def _names(self) -> list[str]:
        """Families in order, their shortest events first."""

        def place(task: str) -> tuple[str, int]:
            family, _, scale = task.partition("/")
            return family, int(scale or 0)

        return sorted(set(self.tasks), key=place)

    def of_task(self) -> dict[str, np.ndarray]:
        """Accuracy of each seed on each task, float [K] in percent."""
        names = np.array(self.tasks)
        return {task: 100 * self.right[:, names == task].mean(1) for task in self._names()}

    def chance_of_task(self) -> dict[str, float]:
        """Chance level of each task, percent."""
        names = np.array(self.tasks)
        return {task: 100 * float(self.chance[names == task].mean()) for task in self._names()}

    def averages(self) -> np.ndarray:
        """Mean over tasks of the accuracy of each seed, float [K] in percent."""
        return np.mean(list(self.of_task().values()), axis=0)

    def to_json(self) -> dict[str, object]:
        """What `from_json` reads; answers are packed bits."""
        names = self._names()
        numbers = np.array([names.index(task) for task in self.tasks], np.uint8)
        return {
            "clips": len(self.tasks),
            "tasks": names,
            "task_of_clip": _text(numbers),
            "chance": self.chance_of_task(),
            "visual_tokens": self.visual_tokens,
            "right": [_text(np.packbits(seed)) for seed in self.right],
            "accuracy": {t: np.round(a, 2).tolist() for t, a in self.of_task().items()},
        }

    @staticmethod
    def from_json(found: dict) -> "Answers":
        """Inverse of `to_json`."""
        count = found["clips"]
        tasks = tuple(found["tasks"][i] for i in _bytes(found["task_of_clip"]))
        right = [np.unpackbits(_bytes(one))[:count].astype(bool) for one in found["right"]]
        chance = np.array([found["chance"][task] / 100 for task in tasks])
        return Answers(np.stack(right), tasks, chance, found["visual_tokens"])


def _text(x: np.ndarray) -> str:
    return base64.b64encode(x.tobytes()).decode()


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8)
