"""The machine that a pickle is a program for: a stack, a memo, and what each operation does to them.

It knows protocols 0 to 5 but for shared registries and buffers kept elsewhere. No operation imports or calls anything:
names are looked up in `pickled_names`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO

from rcnn.weight_files.pickled_names import checked_key, look_up, may_be_called, new_object
from rcnn.weight_files.pickled_values import (
    Attributed,
    Attributes,
    Budget,
    Inert,
    Known,
    PickledArray,
    PickledDType,
    PickledTensor,
)

# A training checkpoint of a ResNet-101 has 100 thousand; a million losses beside it are as many more.
MAX_OPERATIONS = 4_000_000
LoadPersistent = Callable[[object], object]
_REFUSED = Inert(name="refused")


class PickleMachine:
    """The stack, the memo and what one pickle makes of them.

    `wanted` are the names that the pickle uses and may not, `position` the byte of the operation at work.
    """

    def __init__(self, budget: Budget, load_persistent: LoadPersistent | None) -> None:
        self.budget = budget
        self.load_persistent = load_persistent
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.wanted: dict[str, None] = {}
        self.position = 0

    def run(self, source: IO[bytes]) -> object:
        """The value of the next pickle of `source`. Any error may come of a damaged one; ValueError says what is wrong.

        With names in `wanted` the value is good for nothing.
        """
        start = source.tell()
        for count, (operation, argument, position) in enumerate(pickletools.genops(source)):
            self.position = start if position is None else position
            if count >= MAX_OPERATIONS:
                raise ValueError(f"more than {MAX_OPERATIONS} operations")
            if operation.name in _LITERALS:
                self.stack.append(argument)
            elif operation.name == "STOP":
                break
            elif operation.name in _STEPS:
                _STEPS[operation.name](self, argument)
            else:
                raise ValueError(f"the operation {operation.name} has no place in a checkpoint")
        return self.stack.pop()

    def since_mark(self) -> list[object]:
        """What was put on the stack since the last mark, taken from it."""
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def name(self, module: object, name: object) -> object:
        """What a name stands for. One that is not allowed is noted, so that the error has them all."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        found = look_up(module, name)
        if found is None:
            self.wanted[f"{module}.{name}"] = None
            return _REFUSED
        return found

    def call(self, function: object, arguments: object) -> object:
        """The result of a function of ours; a stand-in of a stand-in, for a class."""
        if not isinstance(arguments, tuple):
            raise ValueError("a call without arguments")
        if isinstance(function, Known):
            return function.call(self.budget, arguments)
        if not isinstance(function, Inert):
            raise ValueError("a call of what is no function")
        if function is not _REFUSED and not may_be_called(function):
            self.wanted[function.name] = None
        return function

    def build(self, target: object, state: object) -> None:
        """`target.__setstate__(state)`, for what is known."""
        if isinstance(target, Inert | PickledTensor):
            return
        if isinstance(target, Attributes | Attributed):
            content = target if isinstance(target, Attributes) else target.attributes
            if isinstance(state, Mapping):
                self.budget.spend(len(state))
                content.update(state)
        elif isinstance(target, PickledArray) and isinstance(state, tuple):
            _, shape, dtype, fortran, data = state
            target.fill(dtype, shape, fortran is True or fortran == 1, data)
        elif isinstance(target, PickledDType) and isinstance(state, tuple) and state[1] in ("<", ">", "|", "="):
            target.order = state[1]
        else:
            raise ValueError("a state of what has none")

    def set_items(self, target: object, items: list[object]) -> None:
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items of what is no mapping")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def add(self, target: object, items: list[object]) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise ValueError("items of what is no list")

    def persistent(self, identity: object) -> object:
        if self.load_persistent is None:
            raise ValueError("it refers to data outside of it")
        return self.load_persistent(identity)


# Operations whose argument is the value.
_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)


def _push(make: Callable[[], object]) -> Callable[[PickleMachine, object], None]:
    return lambda machine, argument: machine.stack.append(make())


def _mark(machine: PickleMachine, argument: object) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _tuple(machine: PickleMachine, argument: object) -> None:
    items = tuple(machine.since_mark())
    machine.stack.append(items)


def _short_tuple(length: int) -> Callable[[PickleMachine, object], None]:
    def step(machine: PickleMachine, argument: object) -> None:
        if len(machine.stack) < length:
            raise ValueError("an empty stack")
        machine.stack[-length:] = [tuple(machine.stack[-length:])]

    return step


def _list(machine: PickleMachine, argument: object) -> None:
    items = machine.since_mark()
    machine.stack.append(items)


def _dict(machine: PickleMachine, argument: object) -> None:
    items = machine.since_mark()
    machine.stack.append({})
    machine.set_items(machine.stack[-1], items)


def _append(machine: PickleMachine, argument: object) -> None:
    item = machine.stack.pop()
    machine.add(machine.stack[-1], [item])


def _append_many(machine: PickleMachine, argument: object) -> None:
    items = machine.since_mark()
    machine.add(machine.stack[-1], items)


def _set_item(machine: PickleMachine, argument: object) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items(machine.stack[-1], [key, value])


def _set_many(machine: PickleMachine, argument: object) -> None:
    items = machine.since_mark()
    machine.set_items(machine.stack[-1], items)


def _pop(machine: PickleMachine, argument: object) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.since_mark()


def _pop_mark(machine: PickleMachine, argument: object) -> None:
    machine.since_mark()


def _duplicate(machine: PickleMachine, argument: object) -> None:
    machine.stack.append(machine.stack[-1])


def _get(machine: PickleMachine, argument: object) -> None:
    if argument not in machine.memo:
        raise ValueError("a reference to what was never made")
    machine.stack.append(machine.memo[argument])  # pyright: ignore[reportArgumentType]


def _put(machine: PickleMachine, argument: object) -> None:
    machine.memo[argument] = machine.stack[-1]  # pyright: ignore[reportArgumentType]


def _memoize(machine: PickleMachine, argument: object) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _global(machine: PickleMachine, argument: object) -> None:
    module, _, name = str(argument).partition(" ")
    machine.stack.append(machine.name(module, name))


def _stack_global(machine: PickleMachine, argument: object) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.name(module, name))


def _reduce(machine: PickleMachine, argument: object) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(function, arguments))


def _new_object(machine: PickleMachine, argument: object) -> None:
    arguments, cls = machine.stack.pop(), machine.stack.pop()
    if not isinstance(arguments, tuple):
        raise ValueError("an object without arguments")
    machine.stack.append(new_object(machine.budget, cls, arguments))


def _new_object_ex(machine: PickleMachine, argument: object) -> None:
    machine.stack.pop()  # keyword arguments, of which our constructors have none
    _new_object(machine, argument)


def _instance(machine: PickleMachine, argument: object) -> None:
    arguments = machine.since_mark()
    module, _, name = str(argument).partition(" ")
    machine.stack.append(machine.call(machine.name(module, name), tuple(arguments)))


def _object(machine: PickleMachine, argument: object) -> None:
    cls, *arguments = machine.since_mark()
    machine.stack.append(machine.call(cls, tuple(arguments)))


def _build(machine: PickleMachine, argument: object) -> None:
    state = machine.stack.pop()
    machine.build(machine.stack[-1], state)


def _persistent(machine: PickleMachine, argument: object) -> None:
    machine.stack.append(machine.persistent(machine.stack.pop()))


def _nothing(machine: PickleMachine, argument: object) -> None:
    """The protocol's version and the frames say nothing that is needed."""


_STEPS: dict[str, Callable[[PickleMachine, object], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_LIST": _push(list),
    "EMPTY_SET": _push(list),
    "EMPTY_TUPLE": _push(tuple),
    "EMPTY_DICT": _push(dict),
    "MARK": _mark,
    "TUPLE": _tuple,
    "TUPLE1": _short_tuple(1),
    "TUPLE2": _short_tuple(2),
    "TUPLE3": _short_tuple(3),
    "LIST": _list,
    "FROZENSET": _list,
    "DICT": _dict,
    "APPEND": _append,
    "APPENDS": _append_many,
    "ADDITEMS": _append_many,
    "SETITEM": _set_item,
    "SETITEMS": _set_many,
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": _duplicate,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    "MEMOIZE": _memoize,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "NEWOBJ_EX": _new_object_ex,
    "INST": _instance,
    "OBJ": _object,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
