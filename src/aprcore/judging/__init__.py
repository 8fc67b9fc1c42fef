"""Two tensors to figures, and figures to a verdict."""
