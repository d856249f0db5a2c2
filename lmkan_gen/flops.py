"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators of this package.

Four multiplications and additions a function and sample, in each pass: twice a linear layer of the same
shape. The derivative along the inputs is a pass, and so is each term of the second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_Shape = tuple[int, ...]


def register_formulas() -> None:
    """Make them known to torch; the operators have to be defined."""
    ops = torch.ops.lmkan_gen
    formulas: dict[Any, Any] = {
        ops.forward: _forward,
        ops.frozen_forward: _forward,
        ops.frozen_grad_input: _grad_input,
        ops.backward: _backward,
        ops.convolve: _convolve,
        ops.frozen_convolve: _convolve,
        ops.frozen_convolve_grad_input: _convolve_grad_input,
        ops.convolve_backward: _convolve_backward,
        ops.tangent: _tangent,
        ops.double_backward: _double_backward,
    }
    for op, formula in formulas.items():
        register_flop_formula(op)(formula)


def _of_pass(x: _Shape, table: _Shape) -> int:
    return 8 * x[1] * table[2] * table[3]


def _forward(x: _Shape, table: _Shape, *_: Any, **__: Any) -> int:
    return _of_pass(x, table)


def _grad_input(grad: _Shape, x: _Shape, table: _Shape, *_: Any, **__: Any) -> int:
    return _of_pass(x, table)


def _backward(
    grad: _Shape,
    x: _Shape,
    table: _Shape,
    borders: _Shape,
    need_x: bool,
    need_table: bool,
    *_: Any,
    **__: Any,
) -> int:
    return (int(need_x) + int(need_table)) * _of_pass(x, table)


def _of_convolution(y: _Shape, table: _Shape) -> int:
    return 8 * y[0] * y[2] * y[3] * table[2] * table[3]


def _convolve(x: _Shape, table: _Shape, *_: Any, out_shape: _Shape, **__: Any) -> int:
    return _of_convolution(out_shape, table)


def _convolve_grad_input(grad: _Shape, x: _Shape, table: _Shape, *_: Any, **__: Any) -> int:
    return _of_convolution(grad, table)


def _convolve_backward(
    grad: _Shape,
    x: _Shape,
    table: _Shape,
    borders: _Shape,
    need_x: bool,
    need_table: bool,
    *_: Any,
    **__: Any,
) -> int:
    return (int(need_x) + int(need_table)) * _of_convolution(grad, table)


def _tangent(v_x: _Shape, x: _Shape, table: _Shape, *_: Any, **__: Any) -> int:
    return _of_pass(x, table)


def _double_backward(
    v_x: _Shape | None,
    v_table: _Shape | None,
    grad: _Shape,
    x: _Shape,
    table: _Shape,
    borders: _Shape,
    need_grad: bool,
    need_x: bool,
    need_table: bool,
    *_: Any,
    **__: Any,
) -> int:
    # a pass for each of the terms; the table's gradient does not depend on the table
    of_x = 0 if v_x is None else int(need_grad) + int(need_x) + int(need_table)
    of_table = 0 if v_table is None else int(need_grad) + int(need_x)
    return (of_x + of_table) * _of_pass(x, table)
