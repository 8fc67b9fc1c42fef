"""What `torch.save` writes: a zip archive of a pickle and the bytes of each storage.

The pickle is not run. The instructions that `torch.load` itself accepts with `weights_only` are
followed one by one, and instead of calling what it names a tensor is noted as a place in a storage,
held against the bytes that are there. So torch is not needed, and nothing is read before it is
asked for.

Source: torch/_weights_only_unpickler.py, torch/serialization.py and torch/_utils.py (2.6).
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.archive import Archive
from aprcore.ground.errors import FormatError

PICKLE = "data.pkl"
# Dicts, lists and tensors; a byte of a pickle can make one, which takes a hundred.
MOST_OBJECTS = 1 << 20
MOST_AXES = 64  # torch's own

# numpy's types of torch's; bfloat16 is two bytes of no type, as numpy stores it.
_TYPES: Mapping[str, str] = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<V2",
    "int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "<i1", "uint8": "<u1",
    "uint16": "<u2", "uint32": "<u4", "uint64": "<u8", "bool": "|b1",
}  # fmt: skip
_STORAGES: Mapping[str, str] = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip

# What a pickle may name besides storages and types. The first make tensors; of the second nothing
# is known but that `weights_only` lets them through: other kinds of tensor, and plain values.
_DENSE = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
_OPAQUE = frozenset({
    "collections.Counter", "torch.Tensor", "torch.device", "torch.Size",
    "torch.serialization._get_layout", "_codecs.encode", "builtins.bytearray", "builtins.set",
    "builtins.complex", "__builtin__.bytearray", "__builtin__.set", "__builtin__.complex",
    *(f"torch._utils.{name}" for name in (
        "_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage", "_rebuild_nested_tensor",
        "_rebuild_qtensor", "_rebuild_wrapper_subclass", "_rebuild_device_tensor_from_numpy",
        "_rebuild_device_tensor_from_cpu_tensor")),
})  # fmt: skip
_KEYS = (str, int, float, bool, type(None))


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A dense tensor as a view of a storage.

    Attributes:
        member: The storage, in the archive.
        dtype: torch's name of the type: "float32".
        start: The first value's place in the storage, in values.
        shape: Its sizes.
        strides: Values from one index to the next, for each axis.
        storage_bytes: Size of the storage.
    """

    member: str
    dtype: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage_bytes: int

    def read(self, archive: Archive, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop of the first axis, which it must have, in the stored type.

        Raises:
            FormatError: The archive is damaged.
        """
        kind = np.dtype(_TYPES[self.dtype])
        shape = (stop - start, *self.shape[1:])
        if 0 in shape:
            return np.empty(shape, kind)
        first = self.start + start * self.strides[0]
        size = 1 + sum((n - 1) * step for n, step in zip(shape, self.strides))
        data = archive.read_part(self.member, first * kind.itemsize, size * kind.itemsize)
        strides = tuple(step * kind.itemsize for step in self.strides)
        flat = np.frombuffer(data, kind)
        return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)


class Opaque:
    """Something that may be in the file and that is not read: a sparse tensor, a device."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A name in a pickle: what it names is never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    member: str
    dtype: str
    size_bytes: int


def open_torch_file(path: Path) -> tuple[Archive, Any]:
    """An open `.pt` file, and what was saved: dicts, lists, `TorchTensor`s and plain values.

    Raises:
        FormatError: The file is damaged, or holds anything else.
    """
    archive = Archive(path, "is no readable .pt file", "dump it again")
    try:
        return archive, _load(archive)
    except BaseException:
        archive.close()
        raise


def _load(archive: Archive) -> Any:
    pickles = [name for name in archive.members if name.rpartition("/")[2] == PICKLE]
    if len(pickles) != 1:
        raise archive.broken(f"it has {len(pickles)} members {PICKLE}")
    root = pickles[0].removesuffix(PICKLE)
    if f"{root}byteorder" in archive.members:
        order = archive.read(f"{root}byteorder")
        if order != b"little":
            raise archive.broken(f"its byte order is {order[:20]!r}; only little is read")
    machine = _Machine(archive, root)
    try:
        return machine.run(archive.read(pickles[0]))
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError, AttributeError,
            AssertionError) as error:  # fmt: skip
        # An instruction that finds something else than it needs; `genops` where bytes are none.
        raise archive.broken(f"{PICKLE}: {error or type(error).__name__}") from error


class _Machine:
    """Follows a pickle's instructions. Source: the documentation in CPython's pickletools."""

    def __init__(self, archive: Archive, root: str) -> None:
        self._archive = archive
        self._root = root
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._made = 0

    def run(self, data: bytes) -> Any:
        """What the pickle makes.

        Raises:
            ValueError: And whatever else Python raises where the instructions make no sense.
            FormatError: It holds more than tensors in dicts and lists.
        """
        for instruction, argument, _ in pickletools.genops(data):
            if instruction.name == "STOP":
                return self._stack.pop()
            if instruction.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[instruction.name])
            elif instruction.name in _LITERALS:
                if isinstance(argument, str):
                    argument.encode()  # half a character is no text that could be passed on
                self._stack.append(argument)
            else:
                step = _STEPS.get(instruction.name)
                if step is None:
                    raise self._other(instruction.name)
                step(self, argument)
        raise ValueError("it does not end")

    def _other(self, what: str) -> FormatError:
        return FormatError(
            f"holds more than tensors in dicts and lists ({what})", where=self._archive.path,
            hint="save a plain dict of tensors",
        )  # fmt: skip

    def _push(self, value: Any) -> None:
        self._made += 1
        if self._made > MOST_OBJECTS:
            raise ValueError(f"it makes more than {MOST_OBJECTS} objects")
        self._stack.append(value)

    def _popped(self) -> list[Any]:
        """What lies above the last mark."""
        at = self._marks.pop()
        above = self._stack[at:]
        del self._stack[at:]
        return above

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self, _: Any) -> None:
        self._push(tuple(self._popped()))

    def _small_tuple(self, count: int) -> None:
        above = self._stack[-count:]
        if len(above) < count:
            raise ValueError("a tuple of what is not there")
        del self._stack[-count:]
        self._push(tuple(above))

    def _append(self, _: Any) -> None:
        value = self._stack.pop()
        _as(list, self._stack[-1]).append(value)

    def _appends(self, _: Any) -> None:
        values = self._popped()
        _as(list, self._stack[-1]).extend(values)

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._put(key, value)

    def _set_items(self, _: Any) -> None:
        above = self._popped()
        for key, value in zip(above[::2], above[1::2], strict=True):
            self._put(key, value)

    def _put(self, key: Any, value: Any) -> None:
        # To hash a tuple of tuples of tuples would overflow the machine's own stack.
        if not isinstance(key, _KEYS):
            raise self._other(f"a {type(key).__name__} as a key")
        _as(dict, self._stack[-1])[key] = value

    def _remember(self, index: Any) -> None:
        self._memo[index] = self._stack[-1]

    def _recall(self, index: Any) -> None:
        self._stack.append(self._memo[index])

    def _global(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)
        module, _, last = name.rpartition(".")
        known = (
            name in _OPAQUE or name == "collections.OrderedDict"
            or name in ("torch.nn.parameter.Parameter", "torch._tensor._rebuild_from_type_v2")
            or (module == "torch._utils" and last in (*_DENSE, *_PARAMETERS))
            or (module in ("torch", "torch.storage") and last in _STORAGES)
            or (module == "torch" and _is_type_name(last))
        )  # fmt: skip
        if not known:
            raise self._other(name)
        self._push(_Global(name))

    def _persistent(self, _: Any) -> None:
        kind, stored, key, _, count = self._stack.pop()
        if kind != "storage" or not isinstance(key, str) or type(count) is not int:
            raise ValueError("a storage without a name")
        dtype = _STORAGES[_as(_Global, stored).name.rpartition(".")[2]]
        member = f"{self._root}data/{key}"
        if member not in self._archive.members:
            raise self._archive.broken(f"it lacks {member}")
        size_bytes = self._archive.members[member].size_bytes
        if count * np.dtype(_TYPES[dtype]).itemsize != size_bytes:
            raise ValueError(f"{member} has {size_bytes} bytes, not {count} values of {dtype}")
        self._push(_Storage(member, dtype, size_bytes))

    def _reduce(self, _: Any) -> None:
        arguments = _as(tuple, self._stack.pop())
        self._push(self._called(_as(_Global, self._stack.pop()).name, arguments))

    def _new_object(self, _: Any) -> None:
        arguments = _as(tuple, self._stack.pop())
        name = _as(_Global, self._stack.pop()).name
        if name != "collections.OrderedDict" and name not in _OPAQUE:
            raise self._other(name)
        self._push({} if name == "collections.OrderedDict" and not arguments else Opaque())

    def _build(self, _: Any) -> None:
        self._stack.pop()  # what a module's state dict says of itself, besides its tensors
        if not isinstance(self._stack[-1], (dict, Opaque, TorchTensor)):
            raise self._other("an object's state")

    def _called(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What calling a name would make."""
        last = name.rpartition(".")[2]
        if name == "collections.OrderedDict":
            pairs = [] if not arguments else _as(list, arguments[0])
            made: dict[Any, Any] = {}
            for pair in pairs:
                key, value = pair
                if not isinstance(key, _KEYS):
                    raise self._other(f"a {type(key).__name__} as a key")
                made[key] = value
            return made
        if name == "torch._tensor._rebuild_from_type_v2":
            rebuild, kind, inner, *_ = arguments
            if _as(_Global, kind).name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
                return Opaque()
            return self._called(_as(_Global, rebuild).name, _as(tuple, inner))
        if last in _PARAMETERS or name == "torch.nn.parameter.Parameter":
            return arguments[0]
        if last in _DENSE:
            return self._tensor(last, arguments)
        return Opaque()

    def _tensor(self, rebuild: str, arguments: tuple[Any, ...]) -> TorchTensor | Opaque:
        storage, start, shape, strides, *rest = arguments
        if isinstance(storage, Opaque):
            return storage
        dtype = _as(_Storage, storage).dtype
        if rebuild.endswith("v3"):
            dtype = _as(_Global, rest[2]).name.rpartition(".")[2]
        if rebuild.endswith("v2") and len(rest) > 2 and rest[2]:
            return Opaque()  # stored negated or conjugated
        if dtype not in _TYPES:
            return Opaque()  # float8, complex, quantised
        numbers = (start, *_as(tuple, shape), *_as(tuple, strides))
        if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError("a tensor of sizes that are none")
        # Where one size is zero the others may say anything, and numpy counts them all.
        if math.prod(n or 1 for n in shape) >= 2**59:
            raise ValueError(f"a tensor of {list(shape)}")
        if len(shape) != len(strides) or len(shape) > MOST_AXES:
            raise ValueError(f"a tensor of {len(shape)} axes and {len(strides)} strides")
        end = 0 if 0 in shape else start + 1 + sum((n - 1) * s for n, s in zip(shape, strides))
        item_bytes = np.dtype(_TYPES[dtype]).itemsize
        if end * item_bytes > storage.size_bytes:
            raise ValueError(f"a tensor of {list(shape)} beyond the {storage.size_bytes} bytes of"
                             f" {storage.member}")  # fmt: skip
        return TorchTensor(storage.member, dtype, start, shape, strides, storage.size_bytes)


_PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")


def _is_type_name(name: str) -> bool:
    """Whether torch could call a type so, or a scheme of quantisation."""
    kinds = ("float", "bfloat", "int", "uint", "bool", "complex", "qint", "quint", "bits", "half")
    return name.startswith((*kinds, "per_tensor_", "per_channel_"))


def _as(kind: type, value: Any) -> Any:
    """A value that must be of a type.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__.lstrip('_')} is due")
    return value


def _ignore(*_: Any) -> None:
    """Framing says nothing of what is saved."""


_CONSTANTS: Mapping[str, Any] = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (),
}  # fmt: skip
_LITERALS = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
})  # fmt: skip
_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _ignore, "FRAME": _ignore,
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_SET": lambda machine, _: machine._push(Opaque()),
    "MARK": _Machine._mark, "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._small_tuple(1),
    "TUPLE2": lambda machine, _: machine._small_tuple(2),
    "TUPLE3": lambda machine, _: machine._small_tuple(3),
    "APPEND": _Machine._append, "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item, "SETITEMS": _Machine._set_items,
    "BINPUT": _Machine._remember, "LONG_BINPUT": _Machine._remember,
    "MEMOIZE": lambda machine, _: machine._remember(len(machine._memo)),
    "BINGET": _Machine._recall, "LONG_BINGET": _Machine._recall,
    "GLOBAL": _Machine._global, "BINPERSID": _Machine._persistent,
    "REDUCE": _Machine._reduce, "NEWOBJ": _Machine._new_object, "BUILD": _Machine._build,
}  # fmt: skip
