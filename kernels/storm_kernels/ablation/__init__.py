"""The parts of `python -m storm_kernels.ablate`; `storm_kernels.ablate` puts them together."""
