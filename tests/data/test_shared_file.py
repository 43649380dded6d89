"""Files that another process reads."""

import io
import pickle
import subprocess
import sys
import tempfile

from storm_jax.data.shared_file import SharedFile, shared

_READ = """
import pickle, sys
file = pickle.load(sys.stdin.buffer)
with file.open() as opened:
    sys.stdout.buffer.write(opened.read())
"""


def test_another_process_reads_it_from_the_beginning():
    with tempfile.TemporaryFile() as file:  # has no name
        file.write(b"0123")
        file.flush()
        passed = shared(file)
        if not isinstance(passed, SharedFile):  # no /proc here
            assert passed == b"0123"
            return
        done = subprocess.run(
            [sys.executable, "-c", _READ], input=pickle.dumps(passed), capture_output=True
        )
        assert done.stdout == b"0123", done.stderr
        assert file.tell() == 4


def test_what_is_no_file_of_the_system_goes_as_bytes():
    file = io.BytesIO(b"0123")
    file.seek(2)
    assert shared(file) == b"0123"
