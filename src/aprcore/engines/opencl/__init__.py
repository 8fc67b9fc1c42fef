"""The GPU path: the operations of the stages as OpenCL kernels."""
