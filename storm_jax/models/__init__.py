"""The parts of STORM as NNX modules. Axis letters are explained in CONTRIBUTING.md."""
