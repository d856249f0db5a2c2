"""Other orders of a table are used only where they belong to its present values."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from lmkan_gen import LMKAN2DLayer, forms, packing, reference
from lmkan_gen.forms import Forms, forms_of, keep_forms


def right(layer: LMKAN2DLayer, table: Tensor, x: Tensor) -> Tensor:
    """The definition, in float64."""
    return reference.evaluate(x.double(), table.double(), layer.borders.double())


def through_data(table: nn.Parameter) -> None:
    table.data.mul_(-2)


def by_assignment(table: nn.Parameter) -> None:
    table.data = torch.randn_like(table)


def by_an_optimizer(table: nn.Parameter) -> None:
    table.grad = torch.ones_like(table)
    torch.optim.Adam([table], lr=0.5, fused=True).step()


def by_vector_to_parameters(table: nn.Parameter) -> None:
    nn.utils.vector_to_parameters(torch.randn(table.numel()), [table])


def by_storage(table: nn.Parameter) -> None:
    """As FSDP2 does: new values in the memory of an unsharded parameter, under a preserved version."""
    with _unsafe_preserve_version_counter(table):
        torch.as_strided(table.detach(), (table.numel(),), (1,)).normal_()


WRITES = [through_data, by_assignment, by_an_optimizer, by_vector_to_parameters, by_storage]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_a_table_written_to_counts_at_the_next_call(
    write: Callable[[nn.Parameter], None], autocast: torch.dtype | None
) -> None:
    layer, x = LMKAN2DLayer(6, 8, 5, init_scale=1.0), torch.randn(8, 40)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", autocast, enabled=autocast is not None):
            layer(x)
            with torch.enable_grad():
                write(layer.func_parameter)
            y = layer(x)
        table = layer.func_parameter.detach()
        expected = right(layer, table if autocast is None else table.to(autocast), x)
        assert (y.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_frozen_table_written_to_counts_at_the_next_call() -> None:
    layer, x = LMKAN2DLayer(6, 8, 5, init_scale=1.0).eval().freeze(torch.float16), torch.randn(8, 40)
    assert layer.frozen is not None
    frozen = layer.frozen
    layer(x)

    def in_place() -> None:
        frozen.values.mul_(3)

    def replaced() -> None:
        frozen.values = torch.randn_like(frozen.values)

    def assigned() -> None:
        frozen.values.data = torch.randn_like(frozen.values)

    def loaded() -> None:
        other = LMKAN2DLayer(6, 8, 5, init_scale=1.0).eval().freeze(torch.float16)
        layer.load_state_dict(other.state_dict())

    def forgotten() -> None:
        frozen.values.data.mul_(2)
        frozen.forget()

    for change in (in_place, replaced, assigned, loaded, forgotten):
        change()
        expected = right(layer, frozen.values, x)
        assert (layer(x).double() - expected).abs().max() <= 1e-5 * expected.abs().max(), change.__name__
    # what was written is what the layer goes on with
    values = frozen.values.clone()
    assert torch.equal(layer.unfreeze().func_parameter, values.float())


def test_forms_of_a_frozen_table_are_made_once() -> None:
    table = torch.randn(6, 6, 8, 4)
    made: list[str] = []

    def make() -> dict[str, Tensor]:
        made.append("rows")
        return {"rows": packing.rows(table, packing.row_pitch(table.shape[2]))}

    kept = Forms(table)
    first = kept.get("rows", make)
    assert kept.get("rows", make) is first
    table.add_(1)
    assert torch.equal(kept.get("rows", make)["rows"], table.permute(3, 0, 1, 2))
    assert len(made) == 2
    with torch.inference_mode():
        unknown = torch.randn(6, 6, 8, 4)
        of_unknown = Forms(unknown)
        for _ in range(2):
            of_unknown.get("rows", make)
    assert len(made) == 4  # torch tells nothing of writes to it


def test_forms_go_with_their_table() -> None:
    gc.collect()  # layers of other tests
    before = len(forms._kept)

    def keep() -> None:
        table = torch.randn(4, 4, 4, 1)
        keep_forms(table)
        kept = forms_of(table)
        assert kept is not None
        # a view: of one pair nothing has to move
        kept.get("rows", lambda: {"rows": packing.rows(table, packing.row_pitch(table.shape[2]))})
        kept.get("table", lambda: {"table": table})
        assert len(forms._kept) == before + 1

    keep()
    gc.collect()
    assert len(forms._kept) == before


def test_a_training_step_rounds_its_table_once_and_keeps_nothing() -> None:
    rounded: list[torch.Size] = []
    real = packing.RoundedTable.to

    def spy(table: packing.RoundedTable, dtype: torch.dtype) -> Tensor:
        rounded.append(table.values.shape)
        return real(table, dtype)

    before = len(forms._kept)
    layer = LMKAN2DLayer(6, 8, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing.RoundedTable, "to", spy)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.randn(8, 40, requires_grad=True))
        assert len(forms._kept) == before + 1
        y.sum().backward()
    assert len(rounded) == 1  # on a CPU the form is the float32 table of the rounded values
    del y
    gc.collect()
    assert len(forms._kept) == before


@pytest.mark.parametrize("replaced", [False, True])
def test_scales_of_a_frozen_table_count_too(replaced: bool) -> None:
    layer, x = LMKAN2DLayer(6, 8, 5, init_scale=1.0).eval().freeze(torch.int8), torch.randn(8, 40)
    assert layer.frozen is not None
    assert layer.frozen.scales is not None
    before = layer(x)
    if replaced:
        layer.frozen.scales = 2 * layer.frozen.scales
    else:
        layer.frozen.scales.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)
    table = layer.frozen.table.to(torch.float32)
    assert torch.equal(layer.unfreeze().func_parameter, table)
