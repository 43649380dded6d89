"""Who uses the device that several processes share: all together, or one alone to measure."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager


class Turns:
    """Locks in a folder. Whoever waits to be alone keeps newcomers out at the gate."""

    def __init__(self, folder: str):
        os.makedirs(folder, exist_ok=True)
        self._gate = os.path.join(folder, "gate.lock")
        self._device = os.path.join(folder, "device.lock")

    @contextmanager
    def together(self) -> Generator[None]:
        """Others may use the device too."""
        with open(self._gate, "w") as gate, open(self._device, "w") as device:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(device, fcntl.LOCK_SH)
            fcntl.flock(gate, fcntl.LOCK_UN)
            yield

    @contextmanager
    def alone(self) -> Generator[None]:
        """No one else computes on the device."""
        with open(self._gate, "w") as gate, open(self._device, "w") as device:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(device, fcntl.LOCK_EX)
            yield
