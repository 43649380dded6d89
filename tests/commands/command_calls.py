"""Calls a command many times in one process, which imports everything once.

    python -m tests.commands.command_calls NAME

Standard input is a JSON list of {"arguments": [...], "input": text}; standard output gets a JSON
list of [exit status, standard output, standard error].
"""

import contextlib
import importlib
import io
import json
import os
import sys

from absl import flags

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # as the command does
command = importlib.import_module(f"storm_jax.{sys.argv[1]}")
calls = json.load(sys.stdin)
results = []
for call in calls:
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    out, err = io.StringIO(), io.StringIO()
    sys.stdin = io.StringIO(call["input"])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = command.main(command.parse([sys.argv[1], *call["arguments"]]))
        except SystemExit as end:
            status = end.code
    results.append([status, out.getvalue(), err.getvalue()])
json.dump(results, sys.stdout)
sys.stdout.flush()
os._exit(0)
