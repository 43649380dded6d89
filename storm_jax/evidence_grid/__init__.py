"""The paper's ablations on the controlled benchmark; `storm_jax.evidence` is the command."""
