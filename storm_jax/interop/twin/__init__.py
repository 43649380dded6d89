"""Source files that an export carries verbatim: the model for PyTorch users. They never import us."""
