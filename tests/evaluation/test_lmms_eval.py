"""lmms-eval 0.7 with our model, and its scores beside ours on the same predictions.

Skipped where lmms-eval is not installed; docs/evaluation.md says how, and launch/lmms_eval_test.sh
does it.
"""

import json
import os
import subprocess
import sys

import pytest

from storm_jax.data import synthetic
from storm_jax.evaluation.items import Answered
from storm_jax.evaluation.tasks import all_tasks
from tests.commands.conftest import ROOT, called, command_environment
from tests.evaluation.benchmark_files import dump_parquet, mlvu_test_hf, mvbench_hf, videomme_rows
from tests.evaluation.small_run import write_checkpoint

pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own")

OUTPUTS = (
    "A", "B.", "(C)", "D: the three kinds", "The best answer is B", "answer: (D)", "I think it is A.",
    "Based on the video, the answer is C.", "B. Candles.", "A or C", "Both A and B, so C", "none", "",
    "!!!!!!!!", "a", "E", "The correct option is (A) Apples.", "**D**", "C,", "\nB\n", "D)", "Option A",
    "AB", "Apples.", "A B C D", "It shows a man. B", "Answer: D",
)  # fmt: skip
YAML = """
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
  cache_dir: videomme
  video: true
task: videomme_here
test_split: test
output_type: generate_until
cluster_key: videoID
doc_to_visual: !function utils.videomme_doc_to_visual
doc_to_text: !function utils.videomme_doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  do_sample: false
process_results: !function utils.videomme_process_results
metric_list:
  - metric: videomme_perception_score
    aggregation: !function utils.videomme_aggregate_results
    higher_is_better: true
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: "\\nAnswer with the option's letter from the given choices directly."
metadata:
  - version: 0.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Video-MME as Hugging Face has it, twelve questions about four videos, and a checkpoint."""
    folder = tmp_path_factory.mktemp("lmms")
    write_checkpoint(folder / "run")
    home = folder / "videomme"  # the name that lmms-eval wants below HF_HOME
    synthetic.write_split(str(folder), "v", 4, seed=0)
    rows = []
    for number, path in enumerate(sorted((folder / "videos").iterdir())):
        (home / "data").mkdir(parents=True, exist_ok=True)
        path.rename(home / "data" / path.name)
        for question in range(3):
            about = videomme_rows()[question % 2]
            rows.append(
                about
                | {
                    "video_id": f"{number:03d}",
                    "videoID": path.stem,
                    "question_id": f"{number:03d}-{question}",
                    "question": f"{about['question']} {number} {question}",
                    "answer": "ABCD"[(question + number) % 4],
                }
            )
    dump_parquet(home / "videomme" / "test-00000-of-00001.parquet", rows)
    task = folder / "tasks" / "videomme_here"
    task.mkdir(parents=True)
    (task / "utils.py").write_text("from lmms_eval.tasks.videomme.utils import *\n")
    parquet = home / "videomme" / "test-00000-of-00001.parquet"
    (task / "videomme_here.yaml").write_text(YAML.format(parquet=parquet))
    return folder


def test_lmms_eval_runs_its_task_and_agrees(folder):
    process = subprocess.run(
        [
            sys.executable, "-m", "lmms_eval", "--model", "storm_jax", "--model_args",
            f"checkpoint={folder / 'run'},frames=6", "--batch_size", "4", "--tasks",
            "videomme_here", "--include_path", str(folder / "tasks"), "--log_samples",
            "--output_path", str(folder / "out"),
        ],
        cwd=ROOT,
        env=command_environment()
        | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    (log,) = (folder / "out").rglob("*_samples_*.jsonl")
    theirs = {}
    for line in log.read_text().splitlines():
        sample = json.loads(line)
        theirs[sample["videomme_perception_score"]["question_id"]] = sample
    (results,) = (folder / "out").rglob("*_results.json")
    score = json.loads(results.read_text())["results"]["videomme_here"]
    arguments = [
        f"--checkpoint={folder / 'run'}", "--tasks=videomme", f"--data={folder / 'videomme'}",
        f"--out={folder / 'native'}", "--frames=6", "--slots=4", "--prompts=lmms",
    ]  # fmt: skip
    ((status, _, err),) = called("evaluate", [(arguments, "")])
    assert status == 0, err
    ours = (folder / "native" / "videomme" / "samples.jsonl").read_text().splitlines()
    assert len(ours) == len(theirs) == 12
    outputs = set()
    for record in map(json.loads, ours):
        sample = theirs[record["id"]]
        said = sample["filtered_resps"][0]
        outputs.add(said)
        assert said.strip() == record["output"].strip(), record["id"]
        letter = "" if record["predicted"] is None else "ABCD"[record["predicted"]]
        assert sample["videomme_perception_score"]["pred_answer"] == letter
    assert len(outputs) > 2  # else the test would see nothing
    result = json.loads((folder / "native" / "videomme" / "result.json").read_text())
    assert 100 * result["score"]["main"]["value"] == pytest.approx(
        score["videomme_perception_score,none"]
    )


def answered(task, items, outputs):
    return [Answered(i, o, task.extract(o, i, "lmms")) for i, o in zip(items, outputs, strict=True)]


def test_videomme_scores_agree_on_awkward_outputs(folder):
    os.environ.setdefault("HF_HOME", str(folder))
    from lmms_eval.tasks.videomme import utils

    task = all_tasks()["videomme"]
    docs, items = [], []
    row, (item, *_) = videomme_rows()[0], task.load(folder / "videomme")
    for output in OUTPUTS:
        docs.append(utils.videomme_process_results(row, [output])["videomme_perception_score"])
        items.append(item)
    wanted = [d["pred_answer"] for d in docs]
    found = answered(task, items, OUTPUTS)
    got = ["" if r.predicted is None else "ABCD"[r.predicted] for r in found]
    differing = [(o, w, g) for o, w, g in zip(OUTPUTS, wanted, got, strict=True) if w != g]
    # An option's whole text is that option here; lmms-eval sees the A in its first letter.
    assert differing == []
    assert len(set(wanted)) == 5


def test_mvbench_drops_empty_predictions(tmp_path):
    from lmms_eval.tasks.mvbench import utils

    mvbench_hf(tmp_path)
    task = all_tasks()["mvbench"]
    items = [i for i in task.load(tmp_path) if isinstance(i.answer, int)]
    outputs = ["" if n % 2 else i.letters[i.answer] for n, i in enumerate(items)]
    docs = [
        utils.mvbench_process_results(
            {"candidates": list(i.options), "answer": i.options[i.answer]}, [o]
        )["mvbench_accuracy"]
        for i, o in zip(items, outputs, strict=True)
    ]
    whole = [d for d in docs if d["pred_answer"]]
    assert len(docs) > len(whole) > 0
    # Theirs is the accuracy over what was answered, ours over what was asked.
    assert utils.mvbench_aggregate_results(docs) == 100
    score = task.score(answered(task, items, outputs))
    assert score.also["accuracy over all items"].value == pytest.approx(len(whole) / len(docs))


def test_mlvu_test_knows_only_four_of_six_options(tmp_path):
    os.environ.setdefault("HF_HOME", str(tmp_path))
    from lmms_eval.tasks.mlvu import utils

    mlvu_test_hf(tmp_path)
    task = all_tasks()["mlvu_test"]
    item = task.load(tmp_path)[0]
    assert len(item.options) == 6
    for letter in "ABCDEF":
        doc = {"question": item.question, "task_type": "count", "answer": letter}
        theirs = utils.mlvu_process_results(doc, [f"({letter})"])["mlvu_percetion_score"]
        right = theirs["pred_answer"] == letter
        assert right is (letter in "ABCD")
        assert task.extract(f"({letter})", item, "lmms") == "ABCDEF".index(letter)
