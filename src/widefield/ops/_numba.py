"""What the CPU kernels share: sixteen float32 lanes as a numba type, exp and softplus, threads.

Kernels take the addresses of tensors and their strides, all 64-bit integers, so that one compiled
version serves every layout and nothing is copied. They are written in lanes because LLVM does not
vectorise a recurrence by itself; it maps the lanes to one AVX-512 register, to two of AVX2, or to
four of NEON.

The compiled kernels are kept beside the package, or else in the user's cache folder; a change of
the file that holds the kernel, or of this one, makes new ones.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import operator
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

WIDTH = 16  # lanes
BYTES = 4  # of a float32
_FLOAT = ir.FloatType()
_DOUBLE = ir.DoubleType()
_INT = ir.IntType(32)
_LONG = ir.IntType(64)
_FLOATS = ir.VectorType(_FLOAT, WIDTH)
_INTS = ir.VectorType(_INT, WIDTH)
_BITS = ir.VectorType(ir.IntType(1), WIDTH)


class _Lanes(types.Type):
    """Sixteen float32 values."""


class _Mask(types.Type):
    """Sixteen truth values."""


lanes = _Lanes("lanes")
mask = _Mask("mask")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


@register_model(_Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _BITS)


def _infix(function: Any, result: Any, build: Callable[[ir.IRBuilder, Any, Any], Any]) -> None:
    """Teach numba one operator between lanes."""

    @type_callable(function)
    def typer(context: Any) -> Any:
        return lambda left, right: result if left is lanes and right is lanes else None

    @lower_builtin(function, lanes, lanes)
    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return build(builder, *args)


_infix(operator.add, lanes, lambda b, x, y: b.fadd(x, y))
_infix(operator.sub, lanes, lambda b, x, y: b.fsub(x, y))
_infix(operator.mul, lanes, lambda b, x, y: b.fmul(x, y))
_infix(operator.truediv, lanes, lambda b, x, y: b.fdiv(x, y))
_infix(operator.lt, mask, lambda b, x, y: b.fcmp_ordered("<", x, y))
_infix(operator.le, mask, lambda b, x, y: b.fcmp_ordered("<=", x, y))


def _instruction(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make `build(builder, *values)`, which emits LLVM, callable from kernels."""

    def wrap(build: Callable[..., Any]) -> Any:
        def typer(context: Any, *given: Any) -> Any:
            def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
                value = build(builder, *args)
                return context.get_dummy_value() if value is None else value

            return result(*arguments), emit

        typer.__name__ = typer.__qualname__ = build.__name__
        typer.__doc__ = build.__doc__
        typer.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]
        return intrinsic(typer)

    return wrap


def _llvm(builder: ir.IRBuilder, name: str, result: Any, *args: Any, **options: Any) -> Any:
    """Call one of LLVM's own functions."""
    found = builder.module.globals.get(name)
    if found is None:
        found = ir.Function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(found, args, **options)


def _splat(builder: ir.IRBuilder, value: Any) -> Any:
    """The same float in every lane."""
    empty = ir.Constant(_FLOATS, ir.Undefined)
    one = builder.insert_element(empty, value, _INT(0))
    return builder.shuffle_vector(one, empty, ir.Constant(_INTS, [0] * WIDTH))


def _pointer(builder: ir.IRBuilder, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@_instruction(lanes, types.float64)
def full(builder: ir.IRBuilder, value: Any) -> Any:
    """One number, rounded to float32, in every lane."""
    return _splat(builder, builder.fptrunc(value, _FLOAT))


@_instruction(lanes, types.int64)
def load(builder: ir.IRBuilder, address: Any) -> Any:
    """The sixteen floats at an address."""
    return builder.load(_pointer(builder, address, _FLOATS), align=BYTES)


@_instruction(types.float32, types.int64)
def load_number(builder: ir.IRBuilder, address: Any) -> Any:
    """The float at an address."""
    return builder.load(_pointer(builder, address, _FLOAT), align=BYTES)


@_instruction(lanes, types.int64)
def load_one(builder: ir.IRBuilder, address: Any) -> Any:
    """The float at an address, in every lane."""
    return _splat(builder, builder.load(_pointer(builder, address, _FLOAT), align=BYTES))


@_instruction(types.boolean, types.int64)
def load_flag(builder: ir.IRBuilder, address: Any) -> Any:
    """Whether the byte at an address is not zero."""
    byte = builder.load(_pointer(builder, address, ir.IntType(8)))
    return builder.icmp_unsigned("!=", byte, byte.type(0))


@_instruction(types.int64, types.int64)
def load_int(builder: ir.IRBuilder, address: Any) -> Any:
    """The 64-bit integer at an address."""
    return builder.load(_pointer(builder, address, _LONG))


@_instruction(types.void, types.int64, types.int64)
def store_int(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    """Write a 64-bit integer to an address."""
    builder.store(value, _pointer(builder, address, _LONG))


@_instruction(types.void, types.int64, lanes)
def store(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    """Write sixteen floats to an address."""
    builder.store(value, _pointer(builder, address, _FLOATS), align=BYTES)


@_instruction(types.void, types.int64, types.float32)
def store_number(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    """Write one number, rounded to float32, to an address."""
    builder.store(value, _pointer(builder, address, _FLOAT), align=BYTES)


@_instruction(types.void, types.int64)
def prefetch(builder: ir.IRBuilder, address: Any) -> None:
    """Ask for the cache line at an address, which need not exist.

    Rows far apart defeat the hardware's own guess.
    """
    pointer = _pointer(builder, address, ir.IntType(8))
    reading, keep, data = _INT(0), _INT(3), _INT(1)
    _llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, reading, keep, data)


def _copy(builder: ir.IRBuilder, source: Any, target: Any, count: Any) -> None:
    """Copy `count` floats, one by one."""
    source = builder.bitcast(source, _FLOAT.as_pointer())
    target = builder.bitcast(target, _FLOAT.as_pointer())
    with cgutils.for_range(builder, count) as loop:
        item = builder.load(builder.gep(source, [loop.index]), align=BYTES)
        builder.store(item, builder.gep(target, [loop.index]), align=BYTES)


@_instruction(lanes, types.int64, types.int64)
def load_some(builder: ir.IRBuilder, address: Any, count: Any) -> Any:
    """The first `count` floats at an address, zeros in the other lanes; all if `count` is more."""
    pointer = _pointer(builder, address, _FLOATS)
    result = cgutils.alloca_once(builder, _FLOATS)
    whole = builder.icmp_signed(">=", count, count.type(WIDTH))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            builder.store(builder.load(pointer, align=BYTES), result)
        with otherwise:
            builder.store(ir.Constant(_FLOATS, None), result)
            _copy(builder, pointer, result, count)
    return builder.load(result)


@_instruction(types.void, types.int64, lanes, types.int64)
def store_some(builder: ir.IRBuilder, address: Any, value: Any, count: Any) -> None:
    """Write the first `count` lanes to an address; all if `count` is more."""
    pointer = _pointer(builder, address, _FLOATS)
    whole = builder.icmp_signed(">=", count, count.type(WIDTH))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            builder.store(value, pointer, align=BYTES)
        with otherwise:
            source = cgutils.alloca_once(builder, _FLOATS)
            builder.store(value, source)
            _copy(builder, source, pointer, count)


@_instruction(lanes, lanes, lanes, lanes)
def fma(builder: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    """The sum x · y + z, rounded once where the machine can."""
    return _llvm(builder, f"llvm.fmuladd.v{WIDTH}f32", _FLOATS, x, y, z)


@_instruction(lanes, lanes)
def absolute(builder: ir.IRBuilder, x: Any) -> Any:
    """Without the sign."""
    return _llvm(builder, f"llvm.fabs.v{WIDTH}f32", _FLOATS, x)


@_instruction(lanes, mask, lanes, lanes)
def where(builder: ir.IRBuilder, condition: Any, x: Any, y: Any) -> Any:
    """Lanes of x where the condition holds, of y where it does not."""
    return builder.select(condition, x, y)


@_instruction(types.boolean, mask)
def any_lane(builder: ir.IRBuilder, condition: Any) -> Any:
    """Whether the condition holds in some lane."""
    bits = ir.IntType(WIDTH)
    return builder.icmp_unsigned("!=", builder.bitcast(condition, bits), bits(0))


@_instruction(types.float32, lanes)
def sum_of_lanes(builder: ir.IRBuilder, x: Any) -> Any:
    """The sum over the lanes, in pairs."""
    name = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
    return _llvm(builder, name, _FLOAT, _FLOAT(0.0), x, fastmath=("reassoc",))


@_instruction(types.float64, lanes)
def sum_of_squares(builder: ir.IRBuilder, x: Any) -> Any:
    """The sum of the lanes' squares, in float64."""
    wide = builder.fpext(x, ir.VectorType(_DOUBLE, WIDTH))
    name = f"llvm.vector.reduce.fadd.v{WIDTH}f64"
    squares = builder.fmul(wide, wide)
    return _llvm(builder, name, _DOUBLE, _DOUBLE(0.0), squares, fastmath=("reassoc",))


@_instruction(lanes, lanes)
def power_of_two(builder: ir.IRBuilder, shifted: Any) -> Any:
    """2^n, given n + 1.5 · 2^23 with -127 ≤ n ≤ 128: its low bits are moved to the exponent.

    The ends are 0 and infinity.
    """
    bits = builder.bitcast(shifted, _INTS)
    exponent = builder.shl(bits, ir.Constant(_INTS, [23] * WIDTH))
    return builder.bitcast(builder.add(exponent, ir.Constant(_INTS, [127 << 23] * WIDTH)), _FLOATS)


def inlined(function: Callable[..., Any]) -> Any:
    """A helper that disappears into the kernels that call it."""
    # It is called by kernels only: no wrappers.
    bare: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(forceinline=True, error_model="numpy", **bare)(function)


@inlined
def exp_product(x: Any, high: Any, low: Any) -> Any:
    """exp(x · a), given a · log2(e) as the sum of `high` and a small `low`.

    Within one unit in the last place; exactly 1 for x = 0; exactly 0 below 2^-126, so that no state
    decays by a subnormal factor, which is slow; infinite from 2^127.5. NaN stays NaN.
    """
    shift = full(12582912.0)
    power = x * high
    power = where(full(128.0) < power, full(128.0), power)
    shifted = power + shift
    part = fma(x, low, fma(x, high, shift - shifted))
    p = full(0.00015326471475418657)
    p = fma(p, part, full(0.0013390806270763278))
    p = fma(p, part, full(0.009618505835533142))
    p = fma(p, part, full(0.05550359934568405))
    p = fma(p, part, full(0.24022647738456726))
    p = fma(p, part, full(0.6931471824645996))
    p = fma(p, part, full(1.0))
    return where(power < full(-126.0), full(0.0), p * power_of_two(shifted))


@inlined
def exp(x: Any) -> Any:
    """e^x; see `exp_product`."""
    return exp_product(x, full(1.4426950216293335), full(1.925963033500011e-08))


@inlined
def softplus(x: Any) -> Any:
    """log(1 + e^x), at most two units in the last place from torch's; exactly x from 20 on."""
    u = exp(full(0.0) - absolute(x))
    p = full(-0.003290468594059348)
    p = fma(p, u, full(0.020086241886019707))
    p = fma(p, u, full(-0.05745723098516464))
    p = fma(p, u, full(0.10661128163337708))
    p = fma(p, u, full(-0.15344880521297455))
    p = fma(p, u, full(0.19692102074623108))
    p = fma(p, u, full(-0.24958018958568573))
    p = fma(p, u, full(0.33330464363098145))
    p = fma(p, u, full(-0.4999993145465851))
    return where(full(0.0) < x, x, full(0.0)) + fma(u * u, p, u)


@inlined
def silu(x: Any) -> Any:
    """The gate x / (1 + e^-x)."""
    return x / (full(1.0) + exp(full(0.0) - x))


@_instruction(types.int64, types.int64)
def next_task(builder: ir.IRBuilder, call: Any) -> Any:
    """The next task of a call that no thread has taken, or -1."""
    counter = _pointer(builder, call, _LONG)
    task = builder.atomic_rmw("add", counter, _LONG(1), "monotonic")
    count = builder.load(builder.gep(counter, [_LONG(1)]))
    return builder.select(builder.icmp_signed("<", task, count), task, _LONG(-1))


def _arguments(context: Any, call: Any, count: Any) -> Any:
    """The first `count` arguments of a call, as a tuple; `count` is written as a number."""
    if not isinstance(count, types.IntegerLiteral):
        return None

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        first = builder.gep(_pointer(builder, args[0], _LONG), [_LONG(2)])
        items = [builder.load(builder.gep(first, [_LONG(i)])) for i in range(count.literal_value)]
        return context.make_tuple(builder, signature.return_type, items)

    return types.UniTuple(types.int64, count.literal_value)(types.int64, count), emit


arguments: Any = intrinsic(prefer_literal=True)(_arguments)


def _scratch(context: Any, size: Any) -> Any:
    """The address of so many floats on the stack; `size` is written as a number."""
    if not isinstance(size, types.IntegerLiteral):
        return None

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        space = cgutils.alloca_once(builder, _FLOAT, size=size.literal_value)
        space.align = 64
        return builder.ptrtoint(space, _LONG)

    return types.int64(size), emit


scratch: Any = intrinsic(prefer_literal=True)(_scratch)


class Kernel:
    """A function of a call's address that works through its tasks, compiled when it is first run.

    It asks `next_task` for a task until there is none, and reads the `arguments`. Several threads
    may be inside; none needs the GIL.
    """

    def __init__(self, function: Callable[[int], None]) -> None:
        """Remember the function; `numba` compiles it later."""
        self._function = function

    @cached_property
    def _compiled(self) -> Any:
        signature = types.void(types.int64)
        # numba looks at the function's own file; its name must say what else it is made of.
        self._function.__qualname__ = f"{self._function.__name__}_{_fingerprint()}"
        try:
            return numba.cfunc(signature, cache=True, error_model="numpy")(self._function)
        except (RuntimeError, OSError):  # no folder to write to, or no room left in it
            return numba.cfunc(signature, error_model="numpy")(self._function)

    def __call__(self, tasks: int, *arguments: int) -> None:
        """Do all tasks with torch's number of threads; the caller's thread is one of them."""
        compiled = self._compiled
        call = (ctypes.c_int64 * (2 + len(arguments)))(0, tasks, *arguments)
        address = ctypes.addressof(call)
        threads = min(torch.get_num_threads(), tasks)
        if threads <= 1:
            compiled.ctypes(address)
        elif (team := _torch_team()) is not None:
            team(compiled.address, address, threads, 0)
        else:
            _in_plain_threads(compiled.ctypes, address, threads)


@functools.cache
def _fingerprint() -> str:
    """Of this file."""
    try:
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    except OSError:  # inside an archive
        return __name__


@functools.cache
def _torch_team() -> Any:
    """How GCC's OpenMP runs a function in all threads of a team, from the library that torch uses.

    torch's own threads still wait, spinning, for more work when a kernel follows a matrix product;
    threads of anyone else's would have to share the processor with them.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        team = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):  # another system, or another build of torch
        return None
    team.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    team.restype = None
    return team


def _in_plain_threads(function: Callable[[int], None], address: int, threads: int) -> None:
    """The same anywhere; `function` is called through ctypes, which releases the GIL."""
    helpers = [
        threading.Thread(target=function, args=(address,), name="widefield", daemon=True)
        for _ in range(threads - 1)
    ]
    for helper in helpers:
        helper.start()
    function(address)
    for helper in helpers:
        helper.join()
