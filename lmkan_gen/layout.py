"""What stands between a module's interface and layers, which take the batch last: views, no copies.

Kernels read the transposed view of samples ``[batch, inputs]`` as it lies in memory. What comes out lies
batch-last, and goes into the next layer as the view of a view, which is the fastest to read.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def apply_batch_last(
    function: Callable[[Tensor], Tensor], x: Tensor, width: int, batch_first: bool
) -> Tensor:
    """Call ``function``, which maps ``[I, B]`` to ``[O, B]``, on ``x`` in its own layout.

    Args:
        function: what to apply.
        x: ``[*, I]`` with any number of leading axes if ``batch_first``, else ``[I, B]``.
        width: ``I``, for checking.
        batch_first: the layout of ``x`` and of the result.

    Returns:
        ``[*, O]``, a view that is not contiguous, or ``[O, B]``.

    Raises:
        ValueError: ``x`` has another shape.
    """
    axis = -1 if batch_first else 0
    if x.dim() == 0 or x.shape[axis] != width or not (batch_first or x.dim() == 2):
        expected = f"[*, {width}], samples first" if batch_first else f"[{width}, batch], the batch last"
        other = "batch_first=False" if batch_first else "batch_first=True"
        raise ValueError(f"x must be {expected}, got {list(x.shape)}; {other} takes the other layout")
    if not batch_first:
        return function(x)
    y = function(x.reshape(-1, width).T)
    return y.T.reshape(*x.shape[:-1], y.shape[0])


class BatchLastModule(nn.Module):
    """Base of modules that compute on ``[I, B]`` and offer both layouts.

    Subclasses implement `batch_last`.

    Args:
        input_dim: number of inputs.
        batch_first: whether ``forward`` takes ``[*, input_dim]`` (like `nn.Linear`) or
            ``[input_dim, batch]``. Outputs lie batch-last in memory either way.
    """

    def __init__(self, input_dim: int, batch_first: bool) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module.

        Args:
            x: ``[*, input_dim]`` if ``batch_first``, else ``[input_dim, batch]``.

        Returns:
            The same with the number of outputs in place of ``input_dim``.

        Raises:
            ValueError: wrong shape.
            TypeError: wrong dtype.
        """
        if x.dim() == 2:  # usual, and cheaper by some microseconds
            if not self.batch_first:
                if x.shape[0] == self.input_dim:
                    return self.batch_last(x)
            elif x.shape[1] == self.input_dim:
                return self.batch_last(x.t()).t()
        return apply_batch_last(self.batch_last, x, self.input_dim, self.batch_first)

    def batch_last(self, x: Tensor) -> Tensor:
        """``[input_dim, batch]`` -> ``[outputs, batch]``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Sizes and layout."""
        return f"input_dim={self.input_dim}, batch_first={self.batch_first}"
