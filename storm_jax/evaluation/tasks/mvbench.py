"""MVBench (arXiv 2311.17005): 20 tasks of 200 questions about short videos.

Annotations: `json/<task>.json` of OpenGVLab/MVBench, or parquet files in folders named after the
tasks. Five tasks ask about a part of the video, from `start` to `end`. Videos lie in `video/`, or
where lmms-eval keeps them (`star/Charades_segment`, cut to these parts already), or as frames
(`tvqa/frames_fps3_hq`, three a second). Files hold items with one candidate and with equal ones.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from storm_jax.evaluation import files, options, prompts
from storm_jax.evaluation.items import Family, Item, Prompt, TaskError
from storm_jax.evaluation.task import Expected, Task, View

_NAMES = ("MVBench", "mvbench_video")
_ROOTS = ("video", "videos", "data0613", ".")
_CUT = "segment"  # in the names of folders with videos that are cut to the part asked about
_SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail"
    " and movement of objects, and the action and pose of persons. Based on your observations,"
    " select the best option that accurately addresses the question."
)
# Folders of each task's videos, the one with whole videos first.
_STAR = ("star/Charades_v1_480", "star/Charades_segment")
_CLEVRER, _PERCEPTION = ("clevrer/video_validation",), ("perception/videos",)
_FOLDERS: dict[str, tuple[str, ...]] = {
    "action_antonym": ("ssv2_video", "ssv2_video_mp4"),
    "action_count": _PERCEPTION,
    "action_localization": ("sta/sta_video", "sta/sta_video_segment"),
    "action_prediction": _STAR,
    "action_sequence": _STAR,
    "character_order": _PERCEPTION,
    "counterfactual_inference": _CLEVRER,
    "egocentric_navigation": ("vlnqa",),
    "episodic_reasoning": (
        "tvqa/video_fps3_hq",
        "tvqa/frames_fps3_hq",
        "tvqa/video_fps3_hq_segment",
    ),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",),
    "fine_grained_pose": ("nturgbd", "nturgbd_convert"),
    "moving_attribute": _CLEVRER,
    "moving_count": _CLEVRER,
    "moving_direction": _CLEVRER,
    "object_existence": _CLEVRER,
    "object_interaction": _STAR,
    "object_shuffle": _PERCEPTION,
    "scene_transition": ("scene_qa/video",),
    "state_change": _PERCEPTION,
    "unexpected_action": ("FunQA_test/test",),
}


@dataclass(frozen=True)
class MVBench(Task):
    """The metric is the mean of the 20 accuracies, which of a full set is that of all items.

    MVBench's own code takes an empty output for right ("(" is part of "(A)"), and lmms-eval leaves
    it out of the mean; here it is wrong. The official prompt gives its instruction as the system's
    text; some versions of its code repeat it before the question. VILA runs lmms-eval's task.
    """

    families: ClassVar[tuple[Family, ...]] = ("official", "lmms", "vila")
    mean_over: ClassVar[str] = "task"

    @property
    def expected(self) -> Expected:
        return Expected(4000, (1, 5), None, {"task": dict.fromkeys(_FOLDERS, 200)})

    def load(self, data: Path) -> list[Item]:
        patterns = ("json/*.json", "*_*.json", "*_*/*.parquet", "*_*/*/*.parquet")
        roots = files.roots(data, _NAMES)
        items: list[Item] = []
        for path in files.annotations(data, _NAMES, patterns, "MVBench"):
            names = [path.stem, path.parent.name, path.parent.parent.name]
            task = next((name for name in names if name in _FOLDERS), None)
            if task is None:
                raise TaskError(
                    f"{path}: is not called like one of MVBench's 20 tasks ({', '.join(_FOLDERS)})"
                )
            first = sum(item.id.startswith(f"{task}/") for item in items)
            folders = (*_FOLDERS[task], task)
            videos = files.places(
                roots, [f"{root}/{folder}" for root in _ROOTS for folder in folders]
            )
            fields = ("video", "question", "candidates", "answer")
            for number, row in enumerate(files.rows(path, files.read(path), fields, "MVBench")):
                items.append(_item(path, number, row, task, first, videos))
        return options.unique(str(data), items)

    def ask(self, item: Item, family: Family, view: View) -> Prompt:
        listed = options.lines(item, "(A) x")
        if family != "official":
            return prompts.lmms(
                f"Question:{item.question}\nOption:\n{listed}\nOnly give the best option.\n"
            )
        return Prompt(
            f"{prompts.VIDEO}\nQuestion: {item.question}\nOptions:\n{listed}".rstrip()
            + "\nOnly give the best option.",
            system=_SYSTEM,
            answer_prefix="Best option:(",
            max_new_tokens=100,
        )


def _item(
    path: Path, number: int, row: dict[str, Any], task: str, first: int, videos: Sequence[Path]
) -> Item:
    where = f"{path}: item {number}"
    texts = options.checked(where, row["candidates"], least=1, duplicates=True)
    video = files.video(videos, [files.text(path, number, row, "video")])
    start, end = _seconds(where, row, "start"), _seconds(where, row, "end")
    if _CUT in os.path.basename(os.path.dirname(video)):
        start = end = None
    elif os.path.isdir(video) and start is not None and end is not None:
        start, end = 3 * start, 3 * end  # of frames, three a second, each counts as a second
    return Item(
        id=f"{task}/{first + number}",
        video=video,
        question=files.text(path, number, row, "question"),
        options=texts,
        answer=options.answer_index(where, row["answer"], texts, "text"),
        start=start,
        end=end,
        categories={"task": task},
    )


def _seconds(where: str, row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TaskError(f"{where} has {name}={value!r}; it must be seconds") from None


TASKS = (MVBench("mvbench"),)
