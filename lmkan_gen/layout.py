"""What stands between a module's interface and layers, which take the batch last: views, no copies.

Kernels read the transposed view of samples ``[batch, inputs]`` as it lies in memory. What comes out lies
batch-last, and goes into the next layer as the view of a view, which is the fastest to read.
"""

# No annotations as strings in this module: torch.fx copies those of a forward, and cannot pickle strings.

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import Proxy


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


def leaf(module: nn.Module, x: Tensor) -> Any:
    """The call of ``module`` as one node of the graph, where `torch.fx` traces a model that holds it.

    Tracers take only modules of torch for leaves, and cannot follow what a layer makes of shapes and options.

    Args:
        module: what is called.
        x: its only argument.

    Returns:
        A `torch.fx.Proxy`; None if nothing is traced, or if ``module`` is itself what is traced.
    """
    if not isinstance(x, Proxy):
        return None
    path = x.tracer.path_of_module(module)
    return x.tracer.create_proxy("call_module", path, (x,), {}) if path else None


def _trace_batch_last(function: Callable[[Tensor], Tensor], x: Any, width: int, batch_first: bool) -> Any:
    """`apply_batch_last` on a `torch.fx.Proxy`; the shape is checked by layers and by torch, at calls."""
    return function(x.reshape(-1, width).T).T.unflatten(0, x.shape[:-1]) if batch_first else function(x)


class BatchLastModule(nn.Module):
    """Base of modules that compute on ``[I, B]`` and offer both layouts.

    Subclasses implement `batch_last`. Those of torch's operations and other modules alone set `is_leaf` to
    False, and `torch.fx` traces into them.

    Args:
        input_dim: number of inputs.
        batch_first: whether ``forward`` takes ``[*, input_dim]`` (like `nn.Linear`) or
            ``[input_dim, batch]``. Outputs lie batch-last in memory either way.
    """

    is_leaf: ClassVar[bool] = True

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
        if type(x) is Tensor and x.dim() == 2:  # usual, and cheaper by some microseconds
            if not self.batch_first:
                if x.shape[0] == self.input_dim:
                    return self.batch_last(x)
            elif x.shape[1] == self.input_dim:
                return self.batch_last(x.t()).t()
        if isinstance(x, Proxy):
            node = leaf(self, x) if self.is_leaf else None
            if node is None:
                node = _trace_batch_last(self.batch_last, x, self.input_dim, self.batch_first)
            return node
        return apply_batch_last(self.batch_last, x, self.input_dim, self.batch_first)

    def batch_last(self, x: Tensor) -> Tensor:
        """``[input_dim, batch]`` -> ``[outputs, batch]``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Sizes and layout."""
        return f"input_dim={self.input_dim}, batch_first={self.batch_first}"
