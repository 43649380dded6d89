"""A benchmark of real mp4 files whose questions need, or provably do not need, order in time.

    python -m storm_jax.data.controlled --out=DIR [--frames=8 --size=48 --families=direction,order]

`families` is the table of questions and claims, docs/controlled.md the description.
"""
