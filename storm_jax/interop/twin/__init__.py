"""The PyTorch twin: source files that travel with an exported model."""
