"""Values of small layers, worked out from the definition with exact arithmetic.

The table of every layer here is ``coefficient(i1, i2, o, p)``, a small integer.

EVEN: with G = 4 all cells are ln 2 wide: knots -2, -1, 0, 1, 2 times ln 2. So for inputs that are
multiples of ln 2 all weights are rational, and values follow by hand. For instance x = (0.5, 0) ln 2:
cells i1 = 2, d1 = 1/2; i2 = 2, d2 = 0; f = (c[2,2] + c[3,2]) / 2. And x = (3, 0.5) ln 2 lies beyond
the last knot: i1 = 3, d1 = 2; i2 = 2, d2 = 1/2; f = -(c[3,2] + c[3,3]) / 2 + (c[4,2] + c[4,3]).
The list was evaluated from the formulas with Python's ``fractions``.

ODD: G = 5, inputs that are decimal fractions; knots are logarithms. Evaluated with 40 digits by mpmath,
then rounded to 17.
"""

from __future__ import annotations

import math


def coefficient(i1: int, i2: int, o: int, p: int) -> int:
    """Table entry ``[i1, i2, o, p]``; nothing about it is symmetric, so that no axes can be mixed up."""
    return (3 * i1 * i1 + 5 * i2 + 7 * i1 * i2 + 4 * o + 9 * p * (i1 + 1)) % 13 - 6


LN2 = math.log(2.0)
#: four inputs per row, in units of ln 2
EVEN_INPUTS_IN_LN2 = (
    (0.5, 0.0, -0.5, 1.5),
    (3.0, 0.5, -1.0, 0.0),
    (0.0, 0.0, 0.0, 0.0),
    (1.0, -1.0, 2.0, -2.0),
    (-4.0, 0.25, 5.0, -0.75),
    (-0.125, 0.875, -1.625, 1.375),
)
#: three outputs per row
EVEN_OUTPUTS = (
    (0.25, -1.5, 0.0),
    (7.0, 2.0, -3.0),
    (11.0, -7.0, 1.0),
    (-9.0, -1.0, 7.0),
    (7.5, -13.75, -5.75),
    (-0.984375, 0.515625, 5.46875),
)
ODD_KNOTS = (
    -1.6094379124341003,
    -0.9162907318741551,
    -0.22314355131420976,
    0.22314355131420976,
    0.9162907318741551,
    1.6094379124341003,
)
ODD_INPUTS = (
    (0.25, -0.5, 1.5, 0.125),
    (-2.5, 0.75, 0.0625, -0.375),
    (10.0, -20.0, 0.5, 3.0),
    (-0.0625, 0.03125, -7.5, 1.0),
)
ODD_OUTPUTS = (
    (-7.924771209207597, -1.8284213162525043, 6.171578683747496),
    (0.4208559414389163, 9.141510230553806, -6.460355473692767),
    (-2248.008716711341, 1898.7859921360687, 1906.7859921360687),
    (-5.890011335683066, -1.4676747843923454, -8.379699664031916),
)
