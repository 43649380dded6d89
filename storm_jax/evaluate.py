"""Runs benchmarks of videos on a training checkpoint.

python -m storm_jax.evaluate --checkpoint=DIR --tasks=videomme,mlvu_dev --data=DIR --out=DIR

Answers go to OUT/TASK/samples.jsonl, scores to OUT/TASK/result.json. A second start goes on where
the first one stopped. docs/evaluation.md describes tasks, options and files.

python -m storm_jax.evaluate compare OUT1 OUT2 ... [--out=DIR]

puts results beside each other: tables, paired tests, plots.

Exit status: 0 done; 1 data, checkpoint or results cannot be used, or videos are missing; 2 flags
that cannot be; 3 too long for the context or the memory; 130 interrupted.
"""

import contextlib
import os
import sys
from typing import cast

from absl import app, flags, logging

from storm_jax import answer_flags, cache_flag, checkpoint, disk, option_flags
from storm_jax.command_exit import USAGE, failed, parse
from storm_jax.config import ConfigError
from storm_jax.data import text
from storm_jax.evaluation import compare_command, report, runner, tasks
from storm_jax.evaluation.answering import Answering
from storm_jax.evaluation.items import FAMILIES, Family, TaskError
from storm_jax.evaluation.plan import Asking
from storm_jax.evaluation.recipe import recipe
from storm_jax.evaluation.results import ResultError
from storm_jax.inference.compile_notice import CompileNotice
from storm_jax.inference.media import Decoders
from storm_jax.inference.tokenizer import load_tokenizer
from storm_jax.inference.weights import QUANTIZATIONS, Quantization

DONE, BAD_INPUT, TOO_LONG, INTERRUPTED = 0, 1, 3, 130

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A training workdir, or one checkpoint.", required=True
)
_TASKS = flags.DEFINE_string(
    "tasks", None, f"Of {', '.join(tasks.all_tasks())}; several by commas.", required=True
)
_DATA = flags.DEFINE_string(
    "data", None, "Folder of the benchmarks, or of the only one.", required=True
)
_OUT = flags.DEFINE_string("out", None, "Folder of the results.", required=True)
_PROMPTS = flags.DEFINE_enum(
    "prompts", None, FAMILIES, "Whose prompts and extraction rules; default: each task's first."
)
_SUBTITLES = flags.DEFINE_bool("subtitles", False, "Show subtitles, where the task has them.")
_LIMIT = flags.DEFINE_integer("limit", 0, "First items of each task; 0: all.", 0)
_ALLOW_MISSING = flags.DEFINE_bool(
    "allow_missing", False, "Leave out items of missing videos; the result says so."
)
_RETRY = flags.DEFINE_bool("retry_failed", False, "Ask again where a video could not be read.")
_FPS = flags.DEFINE_float(
    "fps", None, "Frames a second, up to --frames; 0: evenly spaced; default: as in training.", 0.0
)
_TIMEOUT = flags.DEFINE_float(
    "decode_timeout", 0.0, "Seconds of decoding that a video may take; 0: as in training.", 0.0
)
_QUANTIZATION = flags.DEFINE_enum(
    "quantization", "", QUANTIZATIONS, "Of the weights; docs/inference.md says of which."
)
_SLOTS = flags.DEFINE_integer("slots", 8, "Answers that a device makes at one time.", 1)
_CONTEXT = flags.DEFINE_integer("context", 0, "Tokens of a prompt and its answer; 0: as needed.", 0)
_PER_ENGINE = flags.DEFINE_integer(
    "devices_per_engine", 1, "Devices over which the model is split; the rest is copies of it.", 1
)
_DECODERS = flags.DEFINE_integer("decoders", 0, "Decoding processes; 0: one for each core.", 0)
_PROCESS = flags.DEFINE_integer("process", 0, "Number of this process, where several work.", 0)
_PROCESSES = flags.DEFINE_integer(
    "processes", 1, "Processes (hosts) that share the videos; all with the same --out.", 1
)


class UsageError(ValueError):
    """Flags that cannot be used."""


def asked() -> Asking:
    """How the flags want items to be asked."""
    try:
        options = option_flags.options()
        answer_flags.sampling()
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    trained = checkpoint.read_config(_CHECKPOINT.value)
    try:
        config = options.apply(trained)
    except ConfigError as error:
        raise UsageError(f"--{error}") from error
    config = runner.with_decoding(config, fps=_FPS.value, timeout=_TIMEOUT.value)
    tokenizer = load_tokenizer(_CHECKPOINT.value, config)
    stops = text.stop_tokens(tokenizer, config.data.chat_template)
    return Asking(
        config,
        options,
        tokenizer,
        answer_flags.sampling(stops),
        tuple(answer_flags.STOP.value),
        answer_flags.NEW_TOKENS.value if answer_flags.NEW_TOKENS.present else 0,
        _SUBTITLES.value,
    )


def run() -> None:
    """Does what the flags ask for."""
    if _PROCESS.value >= _PROCESSES.value:
        raise UsageError(
            f"--process={_PROCESS.value} of --processes={_PROCESSES.value}: count from 0"
        )
    if _RETRY.value and _PROCESSES.value > 1:
        raise UsageError("--retry_failed changes what all processes read; run it with one")
    try:
        remedy = "benchmarks are read from files; copy them to a disk, or give where it is mounted"
        data = disk.on_disk("--data", _DATA.value, remedy)
        out = disk.results("--out", _OUT.value)
    except disk.NotOnDiskError as error:
        raise UsageError(str(error)) from error
    place = runner.Place(data, out, _PROCESS.value, _PROCESSES.value)
    wanted = tasks.named(_TASKS.value)
    asking = asked()
    try:
        groups = runner.device_groups(_PER_ENGINE.value)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    shared = recipe(
        path=_CHECKPOINT.value,
        config=asking.config,
        options=asking.options,
        sampling=asking.sampling,
        stop=asking.stop,
        max_new_tokens=asking.max_new_tokens,
        quantization=_QUANTIZATION.value,
        slots=_SLOTS.value,
        devices=groups[0],
    )
    shared["subtitles"] = asking.subtitles
    runs = [
        runner.TaskRun(
            task,
            cast(Family, _PROMPTS.value or task.families[0]),
            place,
            shared,
            _LIMIT.value,
            _RETRY.value,
        )
        for task in wanted
    ]
    runner.check_missing(runs, _ALLOW_MISSING.value)
    cache_flag.keep_programs()
    with Decoders(_DECODERS.value) as decoders, contextlib.closing(CompileNotice()) as notice:
        for each in runs:
            each.prepare(asking, decoders)
        context = runner.context_for(runs, _CONTEXT.value)
        media = {p.request.media for r in runs for p in r.planned if p.request}
        engines, answering = [], None
        if media:
            engines = runner.engines_for(
                _CHECKPOINT.value,
                quantization=cast(Quantization, _QUANTIZATION.value),
                slots=_SLOTS.value,
                context=context,
                per_engine=_PER_ENGINE.value,
                most=len(media),
            )
            answering = Answering(
                engines, asking.tokenizer, decoders, asking.config, asking.options
            )
        found = []
        for each in runs:
            before = notice.seconds
            took = each.answer(answering)
            took["compile_seconds"] = round(notice.seconds - before, 3)
            found.append(each.finish(runner.measured(engines, took, place), asking))
    done = [result for result in found if result is not None]
    if done:
        print(report.table(done))
    for each, result in zip(runs, found, strict=True):
        if result is None:
            print(
                f"{each.task.name}: this process is done; the last one that is writes the result",
                file=sys.stderr,
            )


def main(argv: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # Orbax tells everything that it does
    try:
        if len(argv) > 1:
            raise UsageError(f"arguments not understood: {' '.join(argv[1:])}")
        run()
        return DONE
    except UsageError as error:
        return failed(error, USAGE)
    except runner.TooLongError as error:
        return failed(error, TOO_LONG)
    except (
        checkpoint.CheckpointError,
        ConfigError,
        ResultError,
        TaskError,
        runner.MissingError,
        text.TokenizerError,
    ) as error:
        return failed(error, BAD_INPUT)
    except KeyboardInterrupt:
        return failed("interrupted; the same command goes on from here", INTERRUPTED)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    if sys.argv[1:2] == ["compare"]:  # has none of the flags
        sys.exit(compare_command.main(sys.argv[2:]))
    app.run(main, flags_parser=parse)
