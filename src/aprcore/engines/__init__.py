"""Backends: what the stages of a graph are computed with, each on its own kind of array."""
