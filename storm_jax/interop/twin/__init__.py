"""Source files that an export carries verbatim: the model for PyTorch. They never import us."""
