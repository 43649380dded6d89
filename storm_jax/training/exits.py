"""Exit statuses of `storm_jax.train`, for launchers: after 75 and 76 run the same command again."""

MISTAKE = 1  # the configuration, the data or the run itself is at fault; the message says what
PREEMPTED = 75  # SIGTERM: the state is saved
STUCK = 76  # no progress, or the state could not be saved in time; earlier checkpoints are whole
