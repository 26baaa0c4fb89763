"""Short vectors for compiled loops: the numbers of one voxel, or of two, in one register of the processor.

A vector has four numbers per voxel: the components x, y and z, and a spare one. It knows ``+``, ``-``, ``*`` and ``/``,
with others and with scalars. In memory its numbers are consecutive ones of a flat array, from any index on. Sums over
rows of numbers, where voxels do not matter, take vectors of the largest width (``wide``).

The functions here are instructions for the compiler. Each states the types it takes and gives, and how its code is
built; they work in compiled loops only.
"""

import operator
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

ir: Any = import_module("llvmlite.ir")  # it has no type information, nor have those that follow
binding: Any = import_module("llvmlite.binding")
types: Any = import_module("numba.types")
cgutils: Any = import_module("numba.core.cgutils")
extending: Any = import_module("numba.extending")


REGISTER = 64 if binding.get_host_cpu_features().get("avx512f") else 32  # bytes


class Vector(types.Type):  # type: ignore[misc]
    """The compiler's type of a vector of ``count`` numbers of type ``real``."""

    def __init__(self, real: Any, count: int) -> None:
        self.real, self.count = real, count
        super().__init__(name=f"Vector({real}, {count})")


class _Model(extending.models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(manager.lookup(vector.real).get_value_type(), vector.count))


extending.register_model(Vector)(_Model)


def _register_operator(function: Callable[..., Any], instruction: str) -> None:
    def typer_of(context: Any) -> Any:
        def typer(left: Any, right: Any) -> Any:
            for first, second in ((left, right), (right, left)):
                if isinstance(first, Vector) and second in (first, first.real):
                    return first
            return None

        return typer

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(signature.return_type)
        return getattr(builder, instruction)(*(_everywhere(builder, arg, kind) for arg in args))

    extending.type_callable(function)(typer_of)
    for operands in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        extending.lower_builtin(function, *operands)(build)


_register_operator(operator.add, "fadd")
_register_operator(operator.sub, "fsub")
_register_operator(operator.mul, "fmul")
_register_operator(operator.truediv, "fdiv")


def _everywhere(builder: Any, value: Any, kind: Any) -> Any:
    """A scalar as a vector; vectors as they are."""
    if value.type == kind:
        return value
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.IntType(32)(0))
    return _mix(builder, first, first, [0] * kind.count)


def _mix(builder: Any, first: Any, second: Any, order: Sequence[int]) -> Any:
    """Numbers of two vectors in ``order``, where those of ``second`` count on from those of ``first``."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order)))


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, kind: Any) -> Any:
    data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _load(context: Any, builder: Any, array_type: Any, array: Any, index: Any, count: int) -> Any:
    kind = context.get_value_type(Vector(array_type.dtype, count))
    address = _address(context, builder, array_type, array, index, kind)
    return builder.load(address, align=array_type.dtype.bitwidth // 8)


def _intrinsic(function: Callable[..., Any]) -> Any:
    return extending.intrinsic(function)


@_intrinsic
def voxel(typing: Any, values: Any, i: Any) -> Any:
    """One voxel: ``values[i : i + 4]``."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(context, builder, values, args[0], args[1], 4)

    return Vector(values.dtype, 4)(values, i), build


@_intrinsic
def voxels(typing: Any, values: Any, i: Any, j: Any) -> Any:
    """Two voxels: ``values[i : i + 4]`` and ``values[j : j + 4]``."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, *indices = args
        first, second = (_load(context, builder, values, array, index, 4) for index in indices)
        return _mix(builder, first, second, range(8))

    return Vector(values.dtype, 8)(values, i, j), build


@_intrinsic
def neighbours(typing: Any, values: Any, i: Any) -> Any:
    """Two voxels: ``values[i : i + 8]``."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(context, builder, values, args[0], args[1], 8)

    return Vector(values.dtype, 8)(values, i), build


@_intrinsic
def scalars(typing: Any, values: Any, i: Any) -> Any:
    """Two voxels: the first has ``values[i]`` in every component, the second ``values[i + 1]``."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        both = _load(context, builder, values, args[0], args[1], 2)
        return _mix(builder, both, both, [0, 0, 0, 0, 1, 1, 1, 1])

    return Vector(values.dtype, 8)(values, i), build


@_intrinsic
def wide(typing: Any, values: Any, i: Any) -> Any:
    """A whole register of numbers, not by voxel: ``values[i : i + REGISTER / itemsize]``."""
    count = REGISTER * 8 // values.dtype.bitwidth

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(context, builder, values, args[0], args[1], count)

    return Vector(values.dtype, count)(values, i), build


@_intrinsic
def sixteen(typing: Any, values: Any, i: Any) -> Any:
    """Four voxels, one after the other: ``values[i : i + 16]``."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(context, builder, values, args[0], args[1], 16)

    return Vector(values.dtype, 16)(values, i), build


@_intrinsic
def of_all_voxels(typing: Any, vector: Any) -> Any:
    """The sum of four voxels' numbers as those of one voxel."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        quarters = [_mix(builder, args[0], args[0], range(start, start + 4)) for start in range(0, 16, 4)]
        return builder.fadd(builder.fadd(quarters[0], quarters[1]), builder.fadd(quarters[2], quarters[3]))

    return Vector(vector.real, 4)(vector), build


@_intrinsic
def by_voxel(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four voxels' numbers: ``a`` in every component of the first, ``b`` of the second, and so on."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = ir.VectorType(context.get_value_type(a), 4)
        four = ir.Constant(real, ir.Undefined)
        for place, value in enumerate(args):
            four = builder.insert_element(four, value, ir.IntType(32)(place))
        return _mix(builder, four, four, [place for place in range(4) for _ in range(4)])

    return Vector(a, 16)(a, b, c, d), build


@_intrinsic
def four_times(typing: Any, like: Any, a: Any, b: Any, c: Any) -> Any:
    """Four voxels, each with the components ``a``, ``b`` and ``c`` and a spare 0, in the type of ``like``."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = context.get_value_type(like.real)
        four = ir.Constant(ir.VectorType(real, 4), [0.0] * 4)
        for place, value in enumerate(args[1:]):
            four = builder.insert_element(four, value, ir.IntType(32)(place))
        return _mix(builder, four, four, list(range(4)) * 4)

    return Vector(like.real, 16)(like, a, b, c), build


def _number(place: int) -> Any:
    def number(typing: Any, vector: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.extract_element(args[0], ir.IntType(32)(place))

        return vector.real(vector), build

    return _intrinsic(number)


x_of, y_of, z_of = (_number(place) for place in range(3))  # of one voxel


@_intrinsic
def put(typing: Any, values: Any, i: Any, vector: Any) -> Any:
    """Writes a vector to ``values``, from index ``i`` on."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, index, value = args
        address = _address(context, builder, values, array, index, value.type)
        builder.store(value, address, align=values.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(values, i, vector), build


@_intrinsic
def fetch(typing: Any, values: Any, i: Any) -> Any:
    """Asks for ``values[i]`` to be in the cache soon; ``i`` may lie outside."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, values, args[0], args[1], ir.IntType(8))
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch")
        builder.call(function, [address, number(0), number(3), number(1)])  # to read, keep long, data
        return context.get_dummy_value()

    return types.void(values, i), build


def _part(start: int) -> Any:
    def part(typing: Any, vector: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _mix(builder, args[0], args[0], range(start, start + 4))

        return Vector(vector.real, 4)(vector), build

    return _intrinsic(part)


first_voxel, second_voxel = _part(0), _part(4)


def _reordered(order: Sequence[int]) -> Any:
    """A function that puts each voxel's numbers in another order."""

    def reordered(typing: Any, vector: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            places = [start + place for start in range(0, vector.count, 4) for place in order]
            return _mix(builder, args[0], args[0], places)

        return vector(vector), build

    return _intrinsic(reordered)


turned = _reordered((1, 2, 0, 3))  # y, z, x
all_x, all_y, all_z = (_reordered((place,) * 4) for place in range(3))


def _unit(component: int) -> Any:
    def unit(typing: Any, vector: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return ir.Constant(args[0].type, [float(place % 4 == component) for place in range(vector.count)])

        return vector(vector), build

    return _intrinsic(unit)


unit_x, unit_y, unit_z, nothing = (_unit(component) for component in (0, 1, 2, -1))  # of the type of another vector


@_intrinsic
def columns(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Of four vectors, all x as one vector, all y, and all z; with two voxels, for each of them."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def mix(first: Any, second: Any, *order: int) -> Any:
            starts = range(0, a.count, 4)
            places = [start + (place if place < 4 else a.count + place - 4) for start in starts for place in order]
            return _mix(builder, first, second, places)

        first, second, third, fourth = args
        low, high = mix(first, second, 0, 4, 1, 5), mix(third, fourth, 0, 4, 1, 5)
        rest = mix(first, second, 2, 6, 2, 6), mix(third, fourth, 2, 6, 2, 6)
        parts = mix(low, high, 0, 1, 4, 5), mix(low, high, 2, 3, 6, 7), mix(*rest, 0, 1, 4, 5)
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(a, 3)(a, b, c, d), build


@_intrinsic
def within(typing: Any, vector: Any, limit: Any) -> Any:
    """Whether all numbers of a vector lie between ``-limit`` and ``limit``; NaN does not."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, bound = args
        highest, lowest = (_everywhere(builder, edge, value.type) for edge in (bound, builder.fneg(bound)))
        inside = builder.and_(builder.fcmp_ordered("<", value, highest), builder.fcmp_ordered(">", value, lowest))
        bits = ir.IntType(vector.count)
        return builder.icmp_unsigned("==", builder.bitcast(inside, bits), bits(2**vector.count - 1))

    return types.boolean(vector, limit), build
