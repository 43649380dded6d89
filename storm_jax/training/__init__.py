"""State, loss, optimizer and training step."""
