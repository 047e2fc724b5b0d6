"""What functions that emit LLVM's instructions into compiled loops have in common; b is llvmlite's builder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
instruction: Any = intrinsic  # its first parameter is numba's, not the caller's


def vector(element: Any, values: Any) -> Any:
    """A constant."""
    values = list(values)
    return ir.Constant(ir.VectorType(element, len(values)), values)


def load(b: Any, address: Any, offset: int, kind: Any) -> Any:
    """What lies at an address, aligned or not."""
    value = b.load(b.inttoptr(b.add(address, ir.Constant(I64, offset)), kind.as_pointer()))
    value.align = 1
    return value


def store(b: Any, value: Any, address: Any, offset: int) -> None:
    """Write it there."""
    b.store(value, b.inttoptr(b.add(address, ir.Constant(I64, offset)), value.type.as_pointer())).align = 1


def places(b: Any, vector_: Any, chosen: Any) -> Any:
    """The entries of a vector at these places."""
    return b.shuffle_vector(vector_, ir.Constant(vector_.type, ir.Undefined), vector(I32, chosen))


def repeated(b: Any, value: Any, count: int) -> Any:
    """A vector of one value."""
    one = b.insert_element(ir.Constant(ir.VectorType(value.type, count), ir.Undefined), value, ir.Constant(I32, 0))
    return places(b, one, [0] * count)


def call(b: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """An instruction of the processor by LLVM's name."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), arguments)


def case(b: Any, value: Any, code: dict[int, Callable[[], None]]) -> None:
    """The code of the number that a value is, if any."""
    for number, emit in code.items():
        with b.if_then(b.icmp_signed("==", value, ir.Constant(value.type, number))):
            emit()
