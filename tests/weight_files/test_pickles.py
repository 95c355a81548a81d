"""The machine that reads pickles: the values of Python's own, names that are refused, and what bounds it."""

from __future__ import annotations

import collections
import datetime
import fractions
import io
import os
import pathlib
import pickle
from argparse import Namespace

import pytest
from foreign_bytes import call, mapping, name, pickled, value

from rcnn.errors import CheckpointError
from rcnn.weight_files import pickle_machine
from rcnn.weight_files.pickled_values import Budget, Inert
from rcnn.weight_files.pickles import BoundedReader, read_pickle


def read(content: bytes, budget: int = 1 << 20) -> object:
    return read_pickle(io.BytesIO(content), where="file.pkl", budget=Budget(budget))


def error_of(content: bytes) -> str:
    with pytest.raises(CheckpointError) as error:
        read(content)
    return str(error.value)


PLAIN = {
    "texts": ["", "a", "ünï" * 100, "x" * 70000],
    "numbers": [0, 1, -1, 255, 65536, -(2**31), 2**62, 2**300, 0.5, -1e300, True, False, None],
    "bytes": [b"", b"\x00\xff", b"y" * 70000],
    "nested": {"a": (1, (2, (3, 4, 5, 6))), "b": [[], {}, ()], 3: {"c": [None] * 3}},
}
PLAIN["again"] = [PLAIN["texts"], PLAIN["texts"]]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_those_of_python(protocol: int) -> None:
    assert read(pickle.dumps(PLAIN, protocol=protocol)) == PLAIN


@pytest.mark.parametrize("protocol", range(2, 6))
def test_containers_become_plain_ones(protocol: int) -> None:
    content = {
        "ordered": collections.OrderedDict(b=1, a=2), "counter": collections.Counter("aab"), "set": {1},
        "default": collections.defaultdict(list, a=[1]), "queue": collections.deque([1, 2], maxlen=3),
        "frozen": frozenset({7}), "array": bytearray(b"ab"), "namespace": Namespace(lr=0.1, names=["a"]),
    }  # fmt: skip
    found = read(pickle.dumps(content, protocol=protocol))
    assert found == {
        "ordered": {"b": 1, "a": 2}, "counter": {"a": 2, "b": 1}, "set": [1], "default": {"a": [1]}, "queue": [1, 2],
        "frozen": [7], "array": b"ab", "namespace": {"lr": 0.1, "names": ["a"]},
    }  # fmt: skip


def test_a_list_may_hold_itself() -> None:
    cycle: list[object] = []
    cycle.append(cycle)
    found = read(pickle.dumps(cycle))
    assert isinstance(found, list)
    assert found[0] is found


def test_objects_of_data_become_stand_ins() -> None:
    content = [datetime.datetime(2020, 1, 1), pathlib.PurePosixPath("a/b"), fractions.Fraction(1, 3)]
    found = read(pickle.dumps(content, protocol=2))
    assert isinstance(found, list)
    assert [entry.name.split(".")[0] for entry in found] == ["datetime", "pathlib", "fractions"]
    inert = Inert(name="mmengine.logging.history_buffer.HistoryBuffer")
    buffer = name("mmengine.logging.history_buffer", "HistoryBuffer")
    # Made, filled with items and a state, its method named as protocol 2 does.
    made = buffer + b")\x81" + mapping(a=value(1)) + b"b" + value("k") + value("v") + b"s"
    assert read(pickled(made)) == inert
    assert read(pickled(call(buffer, value(1)) + b"(" + value(1) + value(2) + b"e")) == inert
    method = call(name("__builtin__", "getattr"), buffer, value("mean"))
    assert read(pickled(method)) == Inert(name=f"{inert.name}.mean")


HOSTILE = [
    "builtins.__import__", "builtins.compile", "builtins.eval", "builtins.exec", "builtins.open", "builtins.type",
    "__builtin__.execfile", "code.interact", "commands.getoutput", "copyreg.add_extension", "ctypes.CDLL",
    "functools.reduce", "importlib.import_module", "io.open", "logging.config.listen", "marshal.loads", "nt.system",
    "operator.attrgetter", "os.system", "pdb.run", "pickle.loads", "popen2.popen3", "posix.system", "pty.spawn",
    "runpy.run_path", "shutil.rmtree", "socket.socket", "subprocess.Popen", "sys.exit", "timeit.timeit",
    "types.CodeType", "types.FunctionType", "webbrowser.open",
]  # fmt: skip


@pytest.mark.parametrize("wanted", HOSTILE)
def test_names_of_the_standard_library_are_refused(wanted: str) -> None:
    given = f"file.pkl: it wants {wanted}, which is no data and could run code"
    function = name(*wanted.rsplit(".", 1))
    assert given in error_of(pickled(call(function, value("echo"))))
    assert given in error_of(pickled(function))
    parts = value(wanted.rsplit(".", 1)[0]) + value(wanted.rsplit(".", 1)[1])
    assert given in error_of(pickled(parts + b"\x93" + b")\x81", protocol=4))  # STACK_GLOBAL, NEWOBJ


@pytest.mark.parametrize(
    "wanted", ["torch.load", "torch.hub.load", "numpy.load", "numpy.testing._private.utils.runstring", "pip.main",
               "cloudpickle.cloudpickle._make_function", "mmengine.config.config.compile", "mypackage.tools.run"],
)  # fmt: skip
def test_functions_of_other_packages_must_not_be_called(wanted: str) -> None:
    function = name(*wanted.rsplit(".", 1))
    assert read(pickled(function)) == Inert(name=wanted)
    assert f"it wants {wanted}, which is no data" in error_of(pickled(call(function, value("x"))))


def test_every_wanted_name_is_reported() -> None:
    first, second = call(name("os", "system"), value("a")), call(name("builtins", "eval"), value("b"))
    with pytest.raises(CheckpointError) as error:
        read(pickled(mapping(a=first, b=second, c=first)))
    assert [problem.given.split()[2] for problem in error.value.problems] == ["os.system,", "builtins.eval,"]
    # Also where the pickle is damaged after it.
    assert "it wants os.system" in error_of(pickled(first + b"a"))
    # What a file calls its names cannot paint the terminal.
    assert "it wants os.\\x1b[2J" in error_of(pickled(name("os", "\x1b[2J")))


def test_old_operations_that_make_objects() -> None:
    assert "it wants os.system" in error_of(pickled(b"(" + value("echo") + b"ios\nsystem\n"))  # INST
    assert "it wants os.system" in error_of(pickled(b"(" + name("os", "system") + value("echo") + b"o"))  # OBJ
    assert read(pickled(b"(" + value("a") + b"imymodule\nThing\n")) == Inert(name="mymodule.Thing")


@pytest.mark.parametrize(
    ("operations", "given"),
    [
        (b"\x82\x01", "EXT1 has no place"),
        (b"\x97", "NEXT_BUFFER has no place"),
        (b"h\x05", "a reference to what was never made"),
        (b"0", "IndexError"),
        (value("a") + b"Q", "refers to data outside"),
        (value([1]) + value(2) + b"s", "IndexError"),
        (value(5) + value(1) + value(2) + b"s", "items of what is no mapping"),
        (value(5) + value(1) + b"a", "items of what is no list"),
        (value(5) + b")R", "a call of what is no function"),
        (name("a", "B") + value(1) + b"R", "a call without arguments"),
        (value(5) + b"}b", "a state of what has none"),
        (b"}" + value([1]) + value(2) + b"s", "keys that are neither texts nor numbers"),
        (call(name("builtins", "getattr"), value("a"), value("b")), "of what is no foreign class"),
        (call(name("_codecs", "encode"), value("a"), value("rot13")), "another encoding than latin1"),
        (b"\xff", "opcode"),
        (b"X\xff\xff\xff\x7fab", "expected 2147483647 bytes in a unicodestring4, but only 3 remain"),
        (b"\x8e" + b"\xff" * 7 + b"\x0fab", "bytes"),
    ],
)
def test_damaged_pickles(operations: bytes, given: str) -> None:
    error = error_of(pickled(operations))
    assert "file.pkl: damaged, or not what it claims to be (at byte " in error
    assert given in error


@pytest.mark.parametrize(
    "operations",
    [
        call(name("builtins", "bytearray"), value(2**40)),
        call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), value((2**40,)), value("b")),
        call(name("torch", "Tensor"), value(2**40)),
        value("a") + b"r\xff\xff\xff\xff",  # LONG_BINPUT far beyond the memo
        b"\x95" + b"\xff" * 7 + b"\x0f" + value(1),  # FRAME
    ],
)
def test_a_number_in_the_file_reserves_no_memory(operations: bytes) -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        read(pickled(operations))
    except CheckpointError as error:
        assert "bytes made of what are none" in str(error)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "copy",
    [
        call(name("_codecs", "encode"), b"h\xc8", value("latin1")),
        call(name("collections", "OrderedDict"), b"h\xc9"),
        call(name("builtins", "set"), b"h\xc9"),
        call(name("builtins", "bytearray"), b"h\xc8"),
    ],
)
def test_a_long_value_cannot_be_copied_without_end(copy: bytes) -> None:
    long = value("x" * 2000) + b"q\xc8" + value([("a", "b")] * 2000) + b"q\xc9"
    read(pickled(long + copy * 10), budget=20_000)
    with pytest.raises(CheckpointError, match="unfolds into far more than the file holds"):
        read(pickled(long + copy * 11), budget=20_000)


def test_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    content = pickle.dumps([0] * 90, protocol=2)
    monkeypatch.setattr(pickle_machine, "MAX_OPERATIONS", 100)
    assert read(content) == [0] * 90
    assert "more than 100 operations" in error_of(pickle.dumps([0] * 100, protocol=2))


def test_keys_are_cheap_to_compare() -> None:
    """A tuple within a tuple, a hundred thousand times: Python's own hash of it would end the process."""
    assert "keys that are neither" in error_of(pickled(b"})" + b"\x85" * 100_000 + value(1) + b"s"))
    assert "keys that are neither" in error_of(pickled(b"}" + value(tuple(range(100))) + value(1) + b"s"))
    assert "keys that are neither" in error_of(pickled(b"}" + value(2**5000) + value(1) + b"s"))
    assert read(pickle.dumps({("a", 1): 2})) == {("a", 1): 2}


def test_several_pickles_in_one_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_bytes(pickle.dumps("one") + pickle.dumps("two") + pickle.dumps("three"))
    with open(tmp_path / "a", "rb") as file:
        source = BoundedReader(file, os.path.getsize(tmp_path / "a") - 1)
        found = [read_pickle(source, where="a", budget=Budget(9)) for _ in range(2)]
        assert found == ["one", "two"]
        with pytest.raises(CheckpointError, match="damaged"):
            read_pickle(source, where="a", budget=Budget(9))
