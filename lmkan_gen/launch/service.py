"""What the native launcher asks of Python; see `lmkan_gen.launch.native`."""

from __future__ import annotations

import ctypes
import os
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmkan_gen import forms, packing, toolchain
from lmkan_gen.call import Call
from lmkan_gen.families import Demand
from lmkan_gen.launch.native import VARIABLE, Part, Prepare, Recipe, implementations, raised
from lmkan_gen.launch.numbers import Written, write, write_recipe
from lmkan_gen.packing import RoundedTable
from lmkan_gen.plan import KernelSpec
from lmkan_gen.problem import LayerShape, Operation, TableDtype
from lmkan_gen.toolchain import host
from lmkan_gen.tracing import Traced, UntraceableError, plain

#: the library
SPEC = KernelSpec("launcher.cpp.j2", host.TORCH, ())
#: what the library calls operations, element types and operators, by their places
_OPERATIONS = (Operation.FORWARD, Operation.GRAD_INPUT, Operation.GRAD_TABLE, Operation.BACKWARD)
_DTYPES = (TableDtype.FLOAT32, TableDtype.FLOAT16, TableDtype.BFLOAT16, TableDtype.INT8)
_OPERATORS = ("forward", "backward", "frozen_forward", "frozen_grad_input")
_CALL_NUMBERS = 12


_Prepare = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p)
_Arrange = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.POINTER(ctypes.c_int64),
    ctypes.POINTER(ctypes.c_int64),
)
_Perform = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_int64,
    ctypes.POINTER(ctypes.c_int64),
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_void_p),
)
_Error = ctypes.CFUNCTYPE(ctypes.c_void_p)


class Service:
    """What the library asks of Python. Its functions return 0, or tell of an exception that is kept."""

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare
        self.asked: set[str] = set()
        self.served: set[str] = set()
        self.library: ctypes.CDLL | None = None
        #: which forms plans read together, and the type of the table; the library knows them by their place
        self._arrangements: list[tuple[tuple[str, ...], TableDtype]] = []
        #: what the library has addresses of, by the table's address: its memory, and forms by arrangement
        self._held: dict[int, tuple[Tensor, dict[int, list[Tensor]]]] = {}
        self._with_cuda = ctypes.c_bool()
        self._callbacks = (
            _Prepare(self._on_prepare),
            _Arrange(self._on_arrange),
            _Perform(self._on_perform),
            _Error(_message),
        )
        try:
            self.library = self._load()
        except (RuntimeError, OSError) as error:
            warnings.warn(
                f"the native launcher cannot be used, calls cost more time on the host: {error}; "
                f"{VARIABLE}=python asks for this silently",
                RuntimeWarning,
                stacklevel=5,
            )

    def _load(self) -> ctypes.CDLL:
        library = toolchain.loaded(SPEC, lambda found: ctypes.CDLL(str(found.path)))
        library.lmkan_ready.restype = ctypes.c_char_p
        library.lmkan_version.restype = ctypes.c_int64
        library.lmkan_add.restype = library.lmkan_learn.restype = None
        library.lmkan_by_recipe.restype = ctypes.c_int64
        library.lmkan_version.argtypes = [ctypes.c_void_p]
        library.lmkan_add.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        library.lmkan_learn.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        library.lmkan_by_recipe.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        library.lmkan_forget_table.argtypes = [ctypes.c_int64]
        library.lmkan_register.argtypes = [ctypes.c_bool]
        if (missing := library.lmkan_ready(ctypes.byref(self._with_cuda))) is not None:
            raise RuntimeError(missing.decode())
        probe = torch.zeros(1)
        for expected in (3, 8):
            torch._C._autograd._unsafe_set_version_counter((probe,), (expected,))
            handle = _pointer(torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([probe])[0])
            if library.lmkan_version(handle) != expected:
                raise RuntimeError("torch tells versions of tensors otherwise than this library reads them")
            torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(handle)])
        library.lmkan_serve(*self._callbacks)
        return library

    def serve(self, kind: str) -> None:
        self.asked.add(kind)
        if self.library is None or kind in self.served or (kind == "cuda" and not self._with_cuda):
            return
        self.library.lmkan_register(kind == "cuda")
        self.served.add(kind)

    def _on_prepare(self, numbers: Any, plans: int) -> int:
        try:
            if os.environ.get(VARIABLE) == "python":
                return 0
            assert self.library is not None
            call = _call(numbers)
            prepared = self._prepare(call)
            written = self._all_written(prepared.parts, call) if prepared else None
            if prepared is None or written is None:
                return 0
            for one in written:
                self.library.lmkan_add(plans, _array(one.numbers), _texts(one.names), len(one.names))
            if prepared.recipe is not None:
                self._teach(prepared.recipe, call, numbers)
        except BaseException as error:
            return _keep(error)
        return 0

    def _all_written(self, parts: Sequence[Part], call: Call) -> list[Written] | None:
        """The plans of a call, each headed by the place of what it reads; None: one cannot be run there."""
        kept = call.table is not TableDtype.FLOAT32
        written = []
        for part in parts:
            one = write(part, kept)
            if one is None or (one.forms and not kept and not call.constant):
                return None
            one.numbers.insert(0, self._arrangement(one.forms, part.table))
            written.append(one)
        return written

    def _teach(self, recipe: Recipe, call: Call, numbers: Any) -> None:
        """Tell the library how the plans of a call follow from its batch."""
        assert self.library is not None
        try:
            written = self._all_written(recipe.parts, call)
        except UntraceableError:
            return
        if written is None:
            return
        names = [name for one in written for name in one.names]
        self.library.lmkan_learn(numbers, _array(write_recipe(recipe, written)), _texts(names))

    def by_recipe(self) -> list[Call]:
        """The calls that the library knows without having asked, oldest first."""
        assert self.library is not None
        count = self.library.lmkan_by_recipe(None, 0)
        numbers = (ctypes.c_int64 * (_CALL_NUMBERS * count))()
        count = min(count, self.library.lmkan_by_recipe(numbers, count))
        return [_call(numbers[_CALL_NUMBERS * i : _CALL_NUMBERS * (i + 1)]) for i in range(count)]

    def _arrangement(self, forms: tuple[str, ...], table: TableDtype) -> int:
        """The place of what a plan reads; a layer's plans for all batches share few."""
        if (forms, table) not in self._arrangements:
            self._arrangements.append((forms, table))
        return self._arrangements.index((forms, table))

    def _on_arrange(self, arrangement: int, address: int, state: Any, made: Any) -> int:
        try:
            found = forms.kept_at(address)
            if found is None:
                return 1
            values, kept = found
            known = [values._version, 0, 0]
            if kept.scales is not None:
                known[1:] = [kept.scales.data_ptr(), kept.scales._version]
            if list(state[0:3]) != known:
                return 1
            names, dtype = self._arrangements[arrangement]
            table = RoundedTable(values, kept.scales)
            buffers = packing.arranged({}, names, dtype, table, kept)
            if not kept.holds(buffers[name] for name in names):
                return 1
            self._hold(values, address, arrangement, [buffers[name] for name in names])
            for i, name in enumerate(names):
                made[i] = buffers[name].data_ptr()
        except BaseException as error:
            return _keep(error)
        return 0

    def _hold(self, values: Tensor, address: int, arrangement: int, tensors: list[Tensor]) -> None:
        if address not in self._held:
            # shares memory and version with the table, but does not keep the table itself
            self._held[address] = values.detach(), {}
            weakref.finalize(values, self._let_go, address).atexit = False
        self._held[address][1][arrangement] = tensors

    def _let_go(self, address: int) -> None:
        assert self.library is not None
        self.library.lmkan_forget_table(address)
        self._held.pop(address, None)

    def _on_perform(
        self, operator: int, handles: Any, count: int, numbers: Any, text: bytes, outputs: Any
    ) -> int:
        try:
            given = [handles[i] for i in range(count)]
            present = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(
                [_capsule(h) for h in given if h]
            )
            tensors = iter(present)
            arguments = [next(tensors) if handle else None for handle in given]
            name = _OPERATORS[operator]
            found = implementations[name](*_arguments(name, arguments, numbers, text.decode()))
            results = [found] if isinstance(found, Tensor) else list(found)
            capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(results)
            for i, capsule in enumerate(capsules):
                outputs[i] = _pointer(capsule)
        except BaseException as error:
            return _keep(error)
        return 0


def _array(numbers: Sequence[int | Traced]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*map(plain, numbers))


def _texts(texts: Sequence[str]) -> Any:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _call(numbers: Any) -> Call:
    operation, inputs, outputs, grids, batch, on_cuda, index, tile, block, fast, table, flags = numbers[0:12]
    return Call(
        _OPERATIONS[operation],
        LayerShape(inputs, outputs, grids, batch),
        torch.device("cuda", index) if on_cuda else torch.device("cpu"),
        Demand(tile or None, block or None, bool(fast)),
        _DTYPES[table],
        deterministic=bool(flags & 1),
        constant=bool(flags & 2),
        strided=bool(flags & 4),
    )


def _arguments(name: str, tensors: list[Tensor | None], numbers: Any, text: str) -> list[Any]:
    """The operator's arguments out of what the library hands over: tensors, numbers, one text."""
    if name == "forward":
        return [*tensors, *numbers[0:4], bool(numbers[4]), text]
    if name == "backward":
        needs = (bool(numbers[0]), bool(numbers[1]))
        return [*tensors[:4], *needs, numbers[2], numbers[3], bool(numbers[4]), text, tensors[4]]
    return list(tensors)


def _keep(error: BaseException) -> int:
    raised.error = error
    raised.text = ctypes.create_string_buffer((str(error) or type(error).__name__).encode())
    return -1


def _message() -> int:
    """Where the message of the thread's last exception is; it stays there until the next."""
    return ctypes.addressof(raised.text)


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = (
    ctypes.py_object,
    [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
)
_of_capsule = ctypes.pythonapi.PyCapsule_GetPointer
_of_capsule.restype, _of_capsule.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _capsule(handle: int) -> Any:
    return _new_capsule(handle, None, None)


def _pointer(capsule: Any) -> int:
    return int(_of_capsule(capsule, None))
