"""Compiled loops of the composition of fields and of its gradient.

``inner`` is the field that is applied first, the last in the list. The others come as interleaved ``copies``.
"""

from typing import Any

import numpy as np

from sitreg_lumir.deform.backends.cpu.interleaved import (
    FOUR,
    add_to_corners,
    blend,
    fetch_ahead,
    find_cells,
    find_clamp_derivatives,
    from_vectors,
    gradients,
    room_for,
    row_at,
    steps_of,
    to_vectors,
)
from sitreg_lumir.deform.backends.cpu.scatter import tile_range
from sitreg_lumir.deform.backends.cpu.threads import compiled
from sitreg_lumir.deform.backends.cpu.vectors import columns, neighbours, nothing, put, scalars


@compiled
def compose(first: Any, last: Any, shape: Any, copies: Any, inner: Any, composed: Any) -> None:
    """Rows of the composition of fields."""
    length, room, size = shape[2], room_for(shape), np.uintp(shape[0] * shape[1] * shape[2])
    zero = np.uintp(0)
    cells, weights = np.empty(room, np.uintp), np.empty((3, room), composed.dtype)
    vectors = np.empty(4 * room, composed.dtype)
    for row in range(first, last):
        x, y, i, start = row_at(row, shape)
        to_vectors(inner, i, size, length, room, vectors, zero)
        before = inner
        for link in range(len(copies) - 1, -1, -1):
            find_cells(x, y, before, i, size, shape, start, cells, weights)
            _move(copies[link], shape, cells, weights, vectors)
            from_vectors(vectors, zero, length, composed, i, size)
            before = composed


@compiled
def _move(copy: Any, shape: Any, cells: Any, weights: Any, vectors: Any) -> None:
    """Adds to a row of displacements what a field says where they lead to."""
    steps = steps_of(shape)
    for z in range(0, shape[2], 2):
        k, j = np.uintp(z), np.uintp(z) * FOUR
        cell, next_cell = cells[k], cells[k + np.uintp(1)]
        wx, wy, wz = scalars(weights[0], k), scalars(weights[1], k), scalars(weights[2], k)
        put(vectors, j, neighbours(vectors, j) + blend(copy, cell, next_cell, steps, wx, wy, wz))
        fetch_ahead(copy, cell, steps)


@compiled
def scatter_compose(
    first: Any, last: Any, tiles: Any, shape: Any, grad: Any, copies: Any, inner: Any, targets: Any, slots: Any,
    grad_inner: Any,
) -> None:  # fmt: skip
    """Tiles of the composition's gradient: goes back through the fields and adds to each field's gradient.

    The gradient of the k-th field is added to ``targets[slots[k]]``, interleaved, unless the slot is -1;
    that of the inner one goes to ``grad_inner``, unless its slot is -1.
    """
    length, room, size = shape[2], room_for(shape), np.uintp(shape[0] * shape[1] * shape[2])
    zero, row_size = np.uintp(0), np.uintp(shape[2])
    links = len(copies)
    cells, weights = np.empty((links, room), np.uintp), np.empty((links, 3, room), grad.dtype)
    free, vectors = np.zeros((links, 4 * room), grad.dtype), np.empty(4 * room, grad.dtype)
    path = np.empty(3 * length, grad.dtype)
    for task in range(first, last):
        batch, x0, x1, y0, y1 = tile_range(tiles[task], shape)
        for x in range(x0, x1):
            for y in range(y0, y1):
                _, _, i, start = row_at((batch * shape[0] + x) * shape[1] + y, shape)
                find_cells(x, y, inner, i, size, shape, start, cells[links - 1], weights[links - 1])
                find_clamp_derivatives(x, y, inner, i, size, shape, free[links - 1])
                if links > 1:
                    to_vectors(inner, i, size, length, room, vectors, zero)
                for link in range(links - 2, -1, -1):
                    _move(copies[link + 1], shape, cells[link + 1], weights[link + 1], vectors)
                    from_vectors(vectors, zero, length, path, zero, row_size)
                    find_cells(x, y, path, zero, row_size, shape, start, cells[link], weights[link])
                    find_clamp_derivatives(x, y, path, zero, row_size, shape, free[link])
                to_vectors(grad, i, size, length, room, vectors, zero)
                for link in range(links):
                    needed = slots[link] >= 0
                    target = targets[slots[link]] if needed else copies[link]
                    _pull(copies[link], target, needed, shape, cells[link], weights[link], free[link], vectors)
                if slots[links] >= 0:
                    from_vectors(vectors, zero, length, grad_inner, i, size)


@compiled
def _pull(copy: Any, target: Any, needed: Any, shape: Any, cells: Any, weights: Any, free: Any, vectors: Any) -> None:
    """Takes a row of gradients back through a look-up of ``copy``; adds them to ``target`` if that is ``needed``."""
    steps = steps_of(shape)
    for z in range(0, shape[2], 2):
        k, j = np.uintp(z), np.uintp(z) * FOUR
        cell, next_cell = cells[k], cells[k + np.uintp(1)]
        wx, wy, wz = scalars(weights[0], k), scalars(weights[1], k), scalars(weights[2], k)
        grad = neighbours(vectors, j)
        _, dx, dy, dz = gradients(copy, cell, next_cell, steps, wx, wy, wz)
        by_x, by_y, by_z = columns(grad * dx, grad * dy, grad * dz, nothing(grad))
        put(vectors, j, grad + (by_x + by_y + by_z) * neighbours(free, j))
        fetch_ahead(copy, cell, steps)
        if needed:
            add_to_corners(target, cell, next_cell, steps, wx, wy, wz, grad)
            fetch_ahead(target, cell, steps)
