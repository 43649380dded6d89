"""Source files that travel with an export; their imports from storm_jax become relative there."""
