"""The GPU path: the operations of the table of stages as OpenCL kernels."""
