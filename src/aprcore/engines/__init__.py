"""Backends: the operations of the table of stages, each on its own kind of array."""
