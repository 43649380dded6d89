"""What the tests of the ablation command share: running it, and reading what it wrote."""

import json
import textwrap

import jax

from storm_kernels import ablate
from tests.kernels.scan_cases import QUICK_COMPILE

CPU = jax.devices("cpu")[0]


def compile_quickly(monkeypatch):
    """Most of the time of these tests is compiling."""
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: compile_(self, QUICK_COMPILE))


def command(capsys, *arguments):
    """Exit status, standard output and standard error."""
    status = ablate.main([*arguments, "--repeats=2", "--seconds=0.01"])
    return status, *capsys.readouterr()


def records(folder):
    """The rows that a run with `--out` has written."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def user_file(tmp_path, body):
    """A file with a scan `right`, and with what `body` defines."""
    path = tmp_path / "mine.py"
    head = """
        import jax
        import jax.numpy as jnp
        from storm_kernels.selective_scan import selective_scan
        def right(*args, **kwargs):
            return selective_scan(*args, **kwargs, implementation="xla")
    """
    path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    return path
