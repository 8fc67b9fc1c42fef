"""Every kernel once, on tiny shapes: what a checking simulator can afford. Run as a script.

Arguments: the number of lanes, and one of `FAULTS` to run a kernel with that fault instead.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.opencl.backend import OpenCLBackend
from aprcore.engines.opencl.device import open_device
from aprcore.engines.opencl.program import Programs
from aprcore.engines.opencl.stored_rows import BLOCK_FORMATS, FLOAT_FORMATS
from aprcore.network.mask import CAUSAL, Mask
from aprcore.network.rope import Rope
from closeness import relative_l2
from stored_weights import fitting_width, random_tensor
from tiny import ArrayWeight

BOUND = 1e-5

_random = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return _random.standard_normal(shape).astype(np.float32)


def weight(*shape: int) -> ArrayWeight:
    return ArrayWeight("w", draw(*shape))


def walk(op: OpenCLBackend) -> None:
    """Run every operation and hold it against the CPU path."""
    cpu = NumpyBackend(1)

    def check(name: str, inputs: list[np.ndarray], *rest: Any) -> None:
        found = op.to_host(getattr(op, name)(*(op.from_host(x) for x in inputs), *rest))
        assert relative_l2(found, getattr(cpu, name)(*inputs, *rest)) <= BOUND, name

    for dtype in (*FLOAT_FORMATS, *BLOCK_FORMATS):
        width = fitting_width(dtype, 45)
        tensor = random_tensor(dtype, (5, width), 1)
        for tokens in (1, 3, 9, 17):
            check("linear", [draw(tokens, width)], [tensor])
        ids = np.array([4, 0])
        np.testing.assert_array_equal(op.to_host(op.embed(ids, tensor)), cpu.embed(ids, tensor))
    x = draw(5, 24)
    check("rms_norm", [x], weight(24), 1e-5)
    check("rms_norm", [x], weight(12), 1e-5, 1.0)
    check("scale", [x], 3.0)
    check("soft_cap", [x], 2.0)
    check("add_bias", [x], [weight(9), weight(15)])
    check("rope", [x], np.arange(5), Rope(1e4, 12))
    for mask in (CAUSAL, Mask(1, 0), Mask(None, None), Mask(2, 1)):
        check("attention_scores", [x, draw(7, 12)], 2, 1, 0.3, mask)
        check("masked_softmax", [draw(2, 5, 7)], mask)
    check("weighted_values", [draw(2, 5, 7), draw(7, 12)], 1)
    for kind in ("silu", "gelu", "gelu_pytorch_tanh", "relu"):
        check("activation", [x], kind)
    check("add", [x, x])
    check("multiply", [x, x])
    check("columns", [x], 3, 11)
    check("rows", [x], 4, 5)
    assert op.argmax(op.from_host(x)) == x.argmax()


# What the simulator must notice, or its silence says nothing. Two work-items each.
FAULTS = {
    "broken": "x[get_global_id(0)] = 1;",  # the buffer has room for one
    "racing": "x[0] = get_global_id(0);",
}


def run_faulty(op: OpenCLBackend, name: str) -> None:
    """Run one of `FAULTS`."""
    import pyopencl as cl

    text = f"kernel void {name}(global float *x) {{ {FAULTS[name]} }}"
    program = Programs(op.device).build(name, text, {})
    buffer = cl.Buffer(op.device.context, cl.mem_flags.READ_WRITE, 4)
    getattr(program, name)(op.device.queue, (2,), (1,), buffer)
    op.finish()


if __name__ == "__main__":
    backend = OpenCLBackend(open_device("oclgrind", lanes=int(sys.argv[1])))
    if len(sys.argv) > 2:
        run_faulty(backend, sys.argv[2])
    else:
        walk(backend)
