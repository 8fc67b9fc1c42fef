"""Running engines to dump what they compute: transformers, llama.cpp, and any engine in torch."""

from aprcore.capture.torch_modules import capture_torch

__all__ = ["capture_torch"]
