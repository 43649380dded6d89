"""What a training step will need on devices that are not there: its compiled form, read and counted."""
