"""Hooks on the modules of any engine in torch, which write what they give under their names.

torch is not imported here: the model that is given brings it along.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.tensor_folder import TensorFolderWriter
from aprcore.ground.errors import TraceError
from aprcore.ground.precision import BFLOAT16

Tensor = Any  # torch.Tensor; torch is no dependency of this package
Module = Any  # torch.nn.Module

# What a model is called with that says what was run, and is no stage.
_IDS = ("input_ids", "tokens", "token_ids")
_INTEGERS = frozenset({"attention_mask", "position_ids", "positions", "cu_seqlens"})


@contextmanager
def capture_torch(
    model: Module,
    directory: Path | str,
    *,
    call: int = 0,
    arithmetic: str | Mapping[str, str] | None = None,
    engine: str = "torch",
    rank: int | None = None,
    only: Callable[[str], bool] | None = None,
) -> Iterator[None]:
    """Write what the modules of a model give while the block runs it.

    A module that gives a tensor writes it under its name (`model.layers.0.mlp.up_proj`); of a tuple
    each tensor is written with its number (`model.layers.0.0` and `.1`: what a layer of vLLM gives,
    and the residual stream beside it). What a module is given is written as `.input` where no other
    module gave it: what an output projection reads, the stream before a norm. Tensors keep their
    types and all their axes, so that of a batch every row is there.

    Of a process that `torch.distributed` runs beside others each writes a folder of its own,
    `rank0`, `rank1`, .... Nothing is written if the block ends with an exception. Hooks see nothing
    of a graph that is replayed or compiled: run the engine eagerly (vLLM: `enforce_eager=True`).

        with capture_torch(model, "dump/"):
            model(input_ids)

    Args:
        model: The module that is called in the block.
        directory: Where it goes; created if missing.
        call: Which call of the model in the block: 1 is the first decoding step of a generation.
        arithmetic: What the engine rounds, for the sidecar; see docs/formats.md.
        engine: What the engine is called, for the sidecar.
        rank: Number of this process among several; None: as `torch.distributed` says.
        only: Which modules, by name; None: all.

    Raises:
        TraceError: The model was not called, or not often enough, or the folder cannot be written.
    """
    number, count = _place(rank)
    folder = Path(directory) if number is None else Path(directory) / f"rank{number}"
    with TensorFolderWriter(folder) as writer:
        watch = _Watch(model, writer, call, only)
        with ExitStack() as stack:
            watch.attach(stack)
            yield
        if watch.calls <= call:
            times = "once" if watch.calls == 1 else f"{watch.calls} times"
            what = "was not called" if not watch.calls else f"was called {times}"
            raise TraceError(
                f"the model {what} in the block, and call {call} was to be captured",
                where=folder, hint="run it inside the block; calls count from 0",
            )  # fmt: skip
        writer.sidecar = Sidecar(
            tokens=watch.tokens,
            model={"file": type(model).__name__},
            backend=engine,
            device=watch.device,
            arithmetic=arithmetic,
            dtype=watch.dtype,
            versions={"torch": _version()},
            settings={
                "call": call,
                **({} if watch.batch is None else {"batch": watch.batch}),
                **({} if number is None else {"rank": number, "ranks": count}),
            },
        )  # fmt: skip


class _Watch:
    """The hooks of one block.

    Attributes:
        calls: How often the model was called.
        tokens: The ids of a call on one sequence.
        batch: Number of sequences, where there are several.
        dtype: The type of the model's parameters, if a sidecar has a word for it.
        device: Where they are.
    """

    def __init__(
        self, model: Module, writer: TensorFolderWriter, call: int,
        only: Callable[[str], bool] | None,
    ) -> None:  # fmt: skip
        self.calls = 0
        self.tokens: tuple[int, ...] | None = None
        self.batch: int | None = None
        self.device = ", ".join(sorted({str(p.device) for p in model.parameters()})) or None
        self.dtype = _coarsest(model)
        self._model = model
        self._writer = writer
        self._call = call
        self._only = only
        self._running: list[str] = []
        self._times: dict[str, int] = {}
        # Tensors that a module gave, while they live, with a digest of what was in them then: an
        # engine may add to them in place, and tensors of inference mode do not tell.
        self._given: dict[int, tuple[weakref.ref[Any], bytes]] = {}
        # A module that several layers share has a name in each.
        self._names: dict[Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)

    def attach(self, stack: ExitStack) -> None:
        """Hook every module; the stack undoes it."""
        for module in self._names:
            before = module.register_forward_pre_hook(self._begin, with_kwargs=True)
            after = module.register_forward_hook(self._end, always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)

    def _begin(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._name(module)
        self._running.append(name)
        if module is self._model:
            self.calls += 1
            if self.calls - 1 == self._call:
                self._note_inputs(args, kwargs)
        elif self._wants(name):
            for i, value in enumerate(args):
                if not _is_floating(value):
                    continue
                values = _on_host(value)
                if not self._was_given(value, values):
                    self._write(f"{name}.input.{i}" if i else f"{name}.input", values)

    def _end(self, module: Module, args: tuple[Any, ...], output: Any) -> None:
        name = self._running.pop()
        if module is self._model:
            is_named = hasattr(output, "logits")
            self._give("logits" if is_named else "output", output.logits if is_named else output)
        elif self._wants(name):
            self._give(name, output)

    def _wants(self, name: str) -> bool:
        return self.calls - 1 == self._call and (self._only is None or self._only(name))

    def _name(self, module: Module) -> str:
        """Its name; of one that has several, that below the innermost module that is running."""
        names = self._names[module]
        if len(names) > 1:
            for outer in reversed(self._running):
                below = [name for name in names if name.startswith(f"{outer}.")]
                if below:
                    return below[0]
        return names[0]

    def _give(self, name: str, output: Any) -> None:
        if self.calls - 1 != self._call:
            return
        if _is_floating(output):
            values = _on_host(output)
            # What the model itself gives is often a module's, shown again.
            if name not in ("logits", "output") or not self._was_given(output, values):
                self._write(name, values)
            self._given[id(output)] = (weakref.ref(output), _digest(values))
        elif isinstance(output, tuple | list):
            for i, part in enumerate(output):
                if _is_floating(part):
                    self._give(f"{name}.{i}", part)

    def _was_given(self, tensor: Tensor, values: NDArray[Any]) -> bool:
        found = self._given.get(id(tensor))
        return found is not None and found[0]() is tensor and found[1] == _digest(values)

    def _note_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The ids, which are the first integers; and with them what else says what is run."""
        named = {name: value for name, value in kwargs.items() if _is_integer(value)}
        ids = next((named[name] for name in _IDS if name in named), None)
        if ids is None:
            ids = next((value for value in args if _is_integer(value)), None)
        if ids is None:
            return
        if ids.dim() == 1 or (ids.dim() == 2 and ids.shape[0] == 1):
            self.tokens = tuple(ids.reshape(-1).tolist())
            return
        self.batch = int(ids.shape[0])
        self._write("input_ids", _on_host(ids))
        for name in sorted(_INTEGERS & named.keys()):
            self._write(name, _on_host(named[name]))

    def _write(self, name: str, values: NDArray[Any]) -> None:
        times = self._times[name] = self._times.get(name, 0) + 1
        told = name if times == 1 else f"{name}@{times}"  # a module that runs more than once
        self._writer.write(told, [self._writer.hold(values)])


def _is_floating(value: Any) -> bool:
    return hasattr(value, "is_floating_point") and bool(value.is_floating_point())


def _is_integer(value: Any) -> bool:
    is_tensor = hasattr(value, "is_floating_point") and value.dim() in (1, 2)
    return bool(is_tensor and not value.is_floating_point() and not value.is_complex())


def _on_host(value: Tensor) -> NDArray[Any]:
    """A copy in its own type; types that numpy has no word for become float32."""
    host = value.detach().cpu().contiguous()
    word = str(host.dtype)
    if word == "torch.bfloat16":
        import torch

        return host.view(torch.int16).numpy().view(BFLOAT16.dtype).copy()
    if word in ("torch.float64", "torch.float32", "torch.float16") or not _is_floating(host):
        return np.array(host.numpy())
    return np.array(host.float().numpy())


def _digest(values: NDArray[Any]) -> bytes:
    return hashlib.blake2b(values.reshape(-1).view(np.uint8).data, digest_size=16).digest()


def _coarsest(model: Module) -> str | None:
    """The coarsest type of the parameters, which the activations have."""
    words = {str(p.dtype) for p in model.parameters()}
    names = ("bfloat16", "float16", "float32", "float64")
    return next((name for name in names if f"torch.{name}" in words), None)


def _place(rank: int | None) -> tuple[int | None, int | None]:
    """This process's number among how many; None where it is alone."""
    import torch

    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    count = torch.distributed.get_world_size() if running else None
    if rank is not None:
        return rank, count
    if count is None or count < 2:
        return None, None
    return torch.distributed.get_rank(), count


def _version() -> str:
    import torch

    return str(torch.__version__)
