"""Published weights in, PyTorch out."""
