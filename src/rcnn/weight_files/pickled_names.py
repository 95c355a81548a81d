"""What the names in a pickle mean here. Nothing is ever imported by a name: a name is looked up in these tables.

* Tensors, storages, arrays and containers are made by functions of ours (`_KNOWN`).
* Names of the standard library are refused, because there a file finds whatever it takes to run a program, but for
  those of mere data (dates, paths, ...), which become stand-ins.
* Any other name becomes a stand-in (`Inert`), which is empty and stays so: MMDetection's message hub or an optimizer
  beside the weights does not hinder reading them. What looks like a function, by its name in lower case, must not be
  called.

Since no name is resolved, what these tables let through cannot run either; they decide what is worth a refusal.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping

import torch

from rcnn.weight_files.pickled_values import (
    Attributed,
    Attributes,
    Budget,
    Inert,
    Known,
    PickledArray,
    PickledDType,
    PickledTensor,
    StorageKind,
    pickled_tensor,
)

Arguments = tuple[object, ...]
Value = Known | Inert | StorageKind | torch.dtype


def look_up(module: str, name: str) -> Value | None:
    """What `module.name` stands for; None where a file that wants it is refused."""
    path = f"{_OF_PYTHON_2.get(module, module)}.{name}"
    if path in _VALUES:
        return _VALUES[path]
    if path in _KNOWN:
        return Known(name=path, call=_KNOWN[path])
    top = module.partition(".")[0]
    of_python = top in sys.stdlib_module_names or top in _MODULES_OF_PYTHON_2
    if of_python and top not in _DATA_MODULES and path not in _DATA_CLASSES:
        return None
    return Inert(name=path[:_LONGEST_NAME])


def may_be_called(stand_in: Inert) -> bool:
    """Whether a stand-in may be "called", which makes another stand-in: a class may, a function may not."""
    path = stand_in.name
    last = path.rpartition(".")[2].lstrip("_")
    return path in _DATA_FUNCTIONS or path.partition(".")[0] in _DATA_MODULES or last[:1].isupper()


_LONGEST_NAME = 200
_OF_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_MODULES_OF_PYTHON_2 = frozenset({"__builtin__", "commands", "copy_reg", "os2", "popen2", "urllib2"})
_DATA_MODULES = frozenset({"datetime", "decimal", "enum", "fractions", "ipaddress", "pathlib", "uuid", "zoneinfo"})
_DATA_CLASSES = frozenset(
    {
        *(f"builtins.{name}" for name in ("bool", "complex", "float", "int", "object", "str")),
        *(f"builtins.{name}" for name in ("range", "slice")),
        "collections.UserDict",
        "functools.partial",
        "logging.Logger",
        "logging.getLogger",
        "re._compile",
        "time.struct_time",
    }
)
_DATA_FUNCTIONS = _DATA_CLASSES | {
    *(f"numpy.random._pickle.{name}" for name in ("__bit_generator_ctor", "__generator_ctor", "__randomstate_ctor")),
    "numpy.float32",
    "numpy.float64",
    "numpy.int64",
    "torch.device",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_wrapper_subclass",
}


def _mapping(budget: Budget, arguments: Arguments) -> Attributed:
    """`OrderedDict()`, or of a mapping or of pairs; a `defaultdict`'s factory is left out."""
    found = Attributed()
    for argument in arguments:
        if isinstance(argument, Mapping):
            budget.spend(len(argument))
            found.update(argument)
        elif isinstance(argument, list | tuple):
            budget.spend(len(argument))
            for pair in argument:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise ValueError("a mapping made of what are no pairs")
                found[checked_key(pair[0])] = pair[1]
    return found


def _attributes(budget: Budget, arguments: Arguments) -> Attributes:
    return Attributes()


def _listed(budget: Budget, arguments: Arguments) -> list[object]:
    items = arguments[0] if arguments else ()
    if not isinstance(items, list | tuple):
        return []
    budget.spend(len(items))
    return list(items)


def _size(budget: Budget, arguments: Arguments) -> tuple[object, ...]:
    return tuple(_listed(budget, arguments))


def _bytes(budget: Budget, arguments: Arguments) -> bytes:
    """`bytes` or a `bytearray`, from bytes or from Python 2's text; of a number it would be as long as that says."""
    content = arguments[0] if arguments else b""
    if not isinstance(content, str | bytes | bytearray):
        raise ValueError("bytes made of what are none")
    budget.spend(len(content))
    return content.encode("latin-1") if isinstance(content, str) else bytes(content)


def _encoded(budget: Budget, arguments: Arguments) -> bytes:
    """Bytes as Python 3 writes them for Python 2: a text in latin-1."""
    if len(arguments) > 1 and arguments[1] != "latin1":
        raise ValueError("bytes in another encoding than latin1")
    return _bytes(budget, arguments[:1])


def _object(budget: Budget, arguments: Arguments) -> object:
    """`copyreg._reconstructor(cls, base, state)` and `copyreg.__newobj__(cls, *args)`: an object of the class."""
    return new_object(budget, arguments[0], ())


def new_object(budget: Budget, cls: object, arguments: Arguments) -> object:
    """An object of a class that the file names: ours, or a stand-in."""
    if isinstance(cls, Known):
        return cls.call(budget, arguments)
    if isinstance(cls, Inert):
        return cls
    raise ValueError("an object of what is no class")


def _attribute(budget: Budget, arguments: Arguments) -> Inert:
    """`getattr(CLASS, NAME)`: how protocol 2 names a method, as mmengine's HistoryBuffer keeps its own."""
    owner, name = arguments[:2]
    if not isinstance(owner, Inert) or not isinstance(name, str):
        raise ValueError("an attribute of what is no foreign class")
    return Inert(name=f"{owner.name}.{name}"[:_LONGEST_NAME])


def _tensor(budget: Budget, arguments: Arguments) -> PickledTensor:
    storage, offset, shape, stride = arguments[:4]
    return pickled_tensor(storage, offset, shape, stride)


def _typed_tensor(budget: Budget, arguments: Arguments) -> PickledTensor:
    dtype = arguments[6]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without a type")
    storage, offset, shape, stride = arguments[:4]
    return pickled_tensor(storage, offset, shape, stride, dtype)


def _first(budget: Budget, arguments: Arguments) -> object:
    """A parameter is its tensor."""
    return arguments[0]


def _tensor_of_type(budget: Budget, arguments: Arguments) -> object:
    """`_rebuild_from_type_v2(function, type, arguments, state)`: a tensor of a subclass is its tensor."""
    function, _, inner, _ = arguments
    if not isinstance(function, Known) or function.call not in (_tensor, _typed_tensor, _first):
        raise ValueError("a tensor made by what makes none")
    return function.call(budget, inner if isinstance(inner, tuple) else ())


def _array(budget: Budget, arguments: Arguments) -> PickledArray:
    return PickledArray()


def _filled_array(budget: Budget, arguments: Arguments) -> PickledArray:
    """`_frombuffer(bytes, dtype, shape, order)`, of protocol 5."""
    data, dtype, shape, order = arguments
    array = PickledArray()
    array.fill(dtype, shape, order == "F", data)
    return array


_NUMBERS = re.compile(r"[<>|=]?(b1|\?|[iu][1248]|f[248]|c8|c16)")


def _dtype(budget: Budget, arguments: Arguments) -> PickledDType | Inert:
    code = arguments[0]
    if isinstance(code, str) and (match := _NUMBERS.fullmatch(code)):
        return PickledDType(code=match[1])
    return Inert(name="numpy.dtype")


def _scalar(budget: Budget, arguments: Arguments) -> object:
    """A number of numpy as one of Python."""
    dtype, data = arguments
    if not isinstance(dtype, PickledDType):
        return Inert(name="numpy.generic")
    array = PickledArray()
    array.fill(dtype, (), False, data)
    return array.to_tensor().item()


Call = Callable[[Budget, Arguments], object]
_NUMPY_CORES = ("numpy.core", "numpy._core")

_KNOWN: dict[str, Call] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "collections.Counter": _mapping,
    "collections.deque": _listed,
    "builtins.dict": _mapping,
    **dict.fromkeys(("builtins.list", "builtins.tuple", "builtins.set", "builtins.frozenset"), _listed),
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "builtins.getattr": _attribute,
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": _object,
    "copyreg.__newobj__": _object,
    "argparse.Namespace": _attributes,
    "types.SimpleNamespace": _attributes,
    # Mappings of the systems' own, in a config beside the weights.
    "addict.addict.Dict": _mapping,
    "detectron2.config.config.CfgNode": _mapping,
    "easydict.EasyDict": _mapping,
    "fvcore.common.config.CfgNode": _mapping,
    "mmcv.utils.config.ConfigDict": _mapping,
    "mmengine.config.config.ConfigDict": _mapping,
    "yacs.config.CfgNode": _mapping,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "numpy.dtype": _dtype,
    **{f"{core}.multiarray._reconstruct": _array for core in _NUMPY_CORES},
    **{f"{core}.multiarray.scalar": _scalar for core in _NUMPY_CORES},
    **{f"{core}.numeric._frombuffer": _filled_array for core in _NUMPY_CORES},
}

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
# Newer types, whose storages are bytes. A release of torch may lack some.
_NEWER = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
_DTYPES = (*_STORAGES.values(), *(getattr(torch, name) for name in _NEWER if hasattr(torch, name)))

_VALUES: dict[str, Value] = {
    **{f"torch.{name}Storage": StorageKind(dtype=dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}Storage": StorageKind(dtype=dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": StorageKind(dtype=None),
    "torch.device": Inert(name="torch.device"),
    **{str(dtype): dtype for dtype in _DTYPES},
}

_MOST_PARTS = 16


def checked_key(key: object) -> object:
    """A key of a mapping that is cheap to compare. Raises ValueError for any other."""
    if key is None or isinstance(key, str | bytes | float | Inert):
        return key
    if isinstance(key, int) and abs(key) < 1 << 63:
        return key
    if isinstance(key, tuple) and len(key) <= _MOST_PARTS and not any(isinstance(part, tuple) for part in key):
        return tuple(checked_key(part) for part in key)
    raise ValueError("a mapping with keys that are neither texts nor numbers")
