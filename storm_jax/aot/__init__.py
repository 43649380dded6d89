"""What a training step needs on devices that are not there: its compiled form, read and counted."""
