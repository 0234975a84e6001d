"""Read a pickle without calling anything that it names.

`pickletools` decodes the opcodes; a machine of this module carries them out on plain containers, numbers, texts and
tensors. Trainers also leave objects of their own in their files (Lightning's hyper-parameters, callbacks): their
classes are never looked up, one inert stand-in takes the place of all of them, and is left out at the end. A file that
would call functions is refused all the same: no trainer writes one, and whoever made it wants something to run.

Work and memory are bounded by the file's size: no opcode copies what is there already, and no tensor has more numbers
than its file has bytes.
"""

from __future__ import annotations

import math
import pickletools
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, UntypedStorage

from lavis_dcd.common.texts import shown

_LONGEST = 1 << 21  # opcodes; a checkpoint with an optimizer has some thousands
_FEWEST, _SHARED = 1000, 4  # values of a content, and per opcode: several places may hold the same container
_DEEPEST = 64  # containers inside each other
_BITS = 1024  # of a whole number; states of random generators have 128
_DIMENSIONS = 64


class UnreadableError(Exception):
    """The pickle holds what no file of weights has; the message says what."""


class CodeError(Exception):
    """The pickle would call a function; the message is its name."""


class Storages(Protocol):
    """The numbers of tensors, which lie beside the pickle."""

    size: int  # of the whole file in bytes

    def numbers(self, key: str, dtype: torch.dtype, count: int) -> UntypedStorage:
        """Return the bytes of ``count`` numbers; raises :class:`UnreadableError` where there are not so many."""


class _StandIn:
    """In the place of unknown classes and of their objects."""


_STAND_IN = _StandIn()


@dataclass(frozen=True)
class _Numbers:
    """The numbers of a tensor, or of several."""

    data: UntypedStorage
    dtype: torch.dtype
    count: int
    longest: int  # bytes of a tensor made from them at most


@dataclass(frozen=True)
class _Maker:
    """Makes a value from the arguments that a pickle gives to the function or class of that name."""

    make: Callable[..., Any]


def _tensor(numbers: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return the view of ``numbers``; torch's own function would enlarge them to whatever ``size`` says."""
    whole = [offset, *size, *stride]
    if not isinstance(numbers, _Numbers) or len(size) != len(stride) or len(size) > _DIMENSIONS:
        raise UnreadableError("a tensor without numbers, sizes or strides")
    if any(type(value) is not int or not 0 <= value < 1 << 48 for value in whole):
        raise UnreadableError(f"a tensor with sizes {shown(tuple(size))} and strides {shown(tuple(stride))}")
    count = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else -1
    if last >= numbers.count or count * numbers.dtype.itemsize > numbers.longest:
        raise UnreadableError(f"a tensor of {shown(tuple(size))}, but the file has {numbers.count} numbers for it")
    return torch.empty(0, dtype=numbers.dtype).set_(numbers.data, offset, tuple(size), tuple(stride))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _ordered_dict(*arguments: Any) -> OrderedDict[Any, Any]:
    if any(arguments):
        raise UnreadableError("a dictionary with its entries as arguments")
    return OrderedDict()


def _size(values: Any = ()) -> torch.Size:
    if not isinstance(values, (list, tuple)) or len(values) > _DIMENSIONS:
        raise UnreadableError("a torch.Size of too many dimensions")
    return torch.Size(values)


_MAKERS = {
    ("collections", "OrderedDict"): _Maker(_ordered_dict),
    ("torch._utils", "_rebuild_tensor"): _Maker(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Maker(_parameter),
    ("torch", "Size"): _Maker(_size),
    ("torch", "device"): _Maker(lambda *arguments: torch.device(*arguments)),
}
# the types of stored numbers, by the names of torch's former storage classes, under which files name them
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}

# Harmless things that trainers leave in files: of the standard library these names, of other packages classes (which a
# capital letter begins) and the functions that put tensors and arrays together.
_HARMLESS = {
    "argparse": {"Namespace"},
    "builtins": {
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
        "slice", "str", "tuple",
    },
    "_codecs": {"encode"},
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "enum": {"Enum"},
    "functools": {"partial"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "types": {"SimpleNamespace"},
    "typing": {"Any"},
    "uuid": {"UUID"},
}  # fmt: skip
_ASSEMBLING = {"_reconstruct", "scalar", "dtype", "ndarray", "_get_layout"}


def _named(module: Any, name: Any) -> Any:
    """Return what stands for the class or function of this name; nothing is imported."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise UnreadableError("a class whose name is no text")
    if (module, name) in _MAKERS:
        return _MAKERS[module, name]
    if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
        return dtype
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return _STORAGES[name]
    known = "builtins" if module == "__builtin__" else module  # Python 2's name
    if known.partition(".")[0] in sys.stdlib_module_names:
        harmless = name in _HARMLESS.get(known, ())
    else:
        last = name.rpartition(".")[2]
        harmless = last.lstrip("_")[:1].isupper() or last.startswith("_rebuild_") or last in _ASSEMBLING
    if not harmless:
        raise CodeError(f"{known}.{name}")
    return _STAND_IN


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_FRESH: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_WITHOUT_EFFECT = {"PROTO", "FRAME"}


class _Machine:
    """Carries out the opcodes of one pickle."""

    def __init__(self, storages: Storages) -> None:
        self.count = 0  # of the opcodes carried out
        self._storages = storages
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under the marks
        self._memo: dict[int, Any] = {}
        self._numbers: dict[str, _Numbers] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            self.count += 1
            if self.count > _LONGEST:
                raise UnreadableError(f"it makes more than {_LONGEST:,} values")
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self._stack.append(_bounded(argument))
            elif name in _FRESH:
                self._stack.append(_FRESH[name]())
            elif name not in _WITHOUT_EFFECT:
                self._step(name, argument)
        raise UnreadableError("it ends too early")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "TUPLE" | "FROZENSET":
                values = self._to_mark()
                self._stack.append(tuple(values) if name == "TUPLE" else frozenset(map(_key, values)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [stack.pop() for _ in range(_TUPLES[name])][::-1]
                stack.append(tuple(values))
            case "APPEND" | "SETITEM":
                length = 1 if name == "APPEND" else 2
                values = [stack.pop() for _ in range(length)][::-1]
                _fill(stack[-1], values, paired=name == "SETITEM")
            case "APPENDS" | "ADDITEMS" | "SETITEMS":
                values = self._to_mark()
                _fill(self._stack[-1], values, paired=name == "SETITEMS")
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                stack.append(_named(module, last))
            case "REDUCE" | "NEWOBJ":
                arguments, maker = stack.pop(), stack.pop()
                stack.append(_made(maker, arguments))
            case "NEWOBJ_EX":
                _, arguments, maker = stack.pop(), stack.pop(), stack.pop()
                stack.append(_made(maker, arguments))
            case "BUILD":
                stack.pop()  # an object's state, which nothing here reads
            case "BINPERSID":
                stack.append(self._stored(stack.pop()))
            case "POP":
                if stack:
                    stack.pop()
                else:
                    self._to_mark()
            case "POP_MARK":
                self._to_mark()
            case _:
                raise UnreadableError(f"the opcode {name}, which torch.save does not write")

    def _to_mark(self) -> list[Any]:
        """Return what was put above the latest mark, and go back to the stack below it."""
        values, self._stack = self._stack, self._below.pop()
        return values

    def _stored(self, stored: Any) -> _Numbers:
        """Return the numbers that a tensor of the pickle refers to."""
        kind, dtype, key, _, count = stored
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise UnreadableError(f"{shown(kind)} is no storage of numbers")
        if type(count) is not int or count < 0:
            raise UnreadableError(f"{shown(count)} is no number of numbers")
        if key not in self._numbers:
            data = self._storages.numbers(key, dtype, count)
            self._numbers[key] = _Numbers(data, dtype, count, self._storages.size)
        known = self._numbers[key]
        if (known.dtype, known.count) != (dtype, count):
            raise UnreadableError(f"the storage {shown(key)} is {known.count} numbers of {known.dtype} and others, too")
        return known


def _made(maker: Any, arguments: Any) -> Any:
    if isinstance(maker, _Maker) and isinstance(arguments, tuple):
        return maker.make(*arguments)
    if maker is not _STAND_IN:
        raise UnreadableError("it calls what is no class")
    return _STAND_IN


def _fill(container: Any, values: list[Any], paired: bool) -> None:
    """Put values, or keys and values by turns, into a container; a stand-in keeps nothing."""
    if paired and isinstance(container, dict) and len(values) % 2 == 0:
        container.update(zip(map(_key, values[::2]), values[1::2], strict=True))
    elif not paired and isinstance(container, list):
        container.extend(values)
    elif not paired and isinstance(container, set):
        container.update(map(_key, values))
    elif container is not _STAND_IN:
        raise UnreadableError(f"it fills a {type(container).__name__}")


def _key(value: Any) -> Any:
    """Return a key of a dictionary, which must be cheap to hash."""
    flat = value if isinstance(value, tuple) and len(value) <= _DIMENSIONS else (value,)
    plain = (str, bytes, int, float, torch.dtype, torch.device, _StandIn, type(None))
    if not all(isinstance(part, plain) for part in flat):
        raise UnreadableError(f"a key that is a {type(value).__name__}")
    return value


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise UnreadableError(f"a whole number of {value.bit_length()} bits")
    return value


class _Pruning:
    """Copies a content without stand-ins; what it holds several times counts as often, and nothing holds itself."""

    def __init__(self, most: int) -> None:
        self._left = most

    def of(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        if self._left < 0 or depth > _DEEPEST:
            raise UnreadableError(f"it holds containers more than {_DEEPEST} deep, or some of them over and over")
        if isinstance(value, dict):
            kept = ((k, v) for k, v in value.items() if not (_left_out(k) or _left_out(v)))
            return {k: self.of(v, depth + 1) for k, v in kept}
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            values = [self.of(v, depth + 1) for v in value if not _left_out(v)]
            return values if isinstance(value, list) else tuple(values)
        if isinstance(value, (set, frozenset)):
            return {v for v in value if not _left_out(v)}
        return value


def _left_out(value: Any) -> bool:
    return isinstance(value, (_StandIn, _Maker, _Numbers))


def unpickled(data: bytes, storages: Storages) -> Any:
    """Return what a pickle holds, without the objects that are neither tensors nor plain containers.

    Raises:
        CodeError: it would call a function.
        UnreadableError: it holds what no file of weights has.
        Exception: it is damaged, so that ``pickletools`` or the machine stumbles.
    """
    machine = _Machine(storages)
    content = machine.run(data)
    return None if _left_out(content) else _Pruning(_FEWEST + _SHARED * machine.count).of(content)
