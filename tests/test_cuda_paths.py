"""Ways to the same kernel, on a GPU: both compilers, and the staging of tiles that Turing needs."""

from __future__ import annotations

import pytest
import torch

from lmkan_gen import device as devices
from lmkan_gen import toolchain
from lmkan_gen.families import Family, families, family
from lmkan_gen.plan import KernelSpec
from lmkan_gen.problem import CALL_OPERATIONS, LayerShape, Operation, Problem
from lmkan_gen.toolchain import nvcc
from lmkan_gen.tuner.verify import TOLERANCES, make_case, output_shapes

#: partial tiles in both directions and odd tails; whole tiles; few samples
SHAPES = (LayerShape(22, 19, 9, 20011), LayerShape(64, 128, 12, 1000), LayerShape(130, 67, 5, 37))
FAMILIES = [
    pytest.param(operation, kind, id=f"{operation}-{kind.name}")
    for operation in CALL_OPERATIONS
    for kind in families("cuda", operation)
]


@pytest.mark.gpu
@pytest.mark.parametrize("operation", [Operation.FORWARD, Operation.GRAD_INPUT, Operation.BACKWARD])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_staged_through_registers(operation: Operation, shape: LayerShape) -> None:
    """What Turing gets, compiled for the GPU here."""
    from lmkan_gen.launch import cuda

    device = torch.device("cuda", 0)
    problem = Problem(operation, shape, devices.cuda(0))
    tiles = family("tile_stationary")
    parameters = tiles.default(problem)
    assert parameters is not None
    spec = tiles.spec(problem, parameters)
    spec = KernelSpec.make(spec.template, spec.arch, {**spec.context, "asynchronous": 0})
    run = cuda.prepare(spec, tiles.plan(problem, parameters), device)
    make_case(operation, shape, device, 2.0, most=64).check(run, str(shape))


@pytest.mark.gpu
@pytest.mark.parametrize(("operation", "kind"), FAMILIES)
def test_both_compilers_make_kernels_of_equal_results(
    operation: Operation, kind: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvcc and NVRTC: both right, and no further from each other than kernels may be from the definition."""
    from lmkan_gen.launch import cuda

    device = torch.device("cuda", 0)
    problem = Problem(operation, SHAPES[1], devices.cuda(0))
    parameters = kind.default(problem)
    if parameters is None:
        pytest.skip("no default for this shape")
    case = make_case(operation, problem.shape, device, 2.0, most=64)
    results: list[dict[str, torch.Tensor]] = []
    identities = []
    for installed in (nvcc.installed(), ()):
        monkeypatch.setattr(nvcc, "installed", lambda installed=installed: installed)
        monkeypatch.setattr(toolchain, "_known", {})
        try:
            identities.append(toolchain.compiler(kind.spec(problem, parameters)).identity.split()[0])
        except toolchain.CompilerMissing as error:
            pytest.skip(str(error))
        run = cuda.prepare(kind.spec(problem, parameters), kind.plan(problem, parameters), device)
        case.check(run, identities[-1])
        outputs = {
            name: torch.zeros(size, device=device)
            for name, size in output_shapes(operation, problem.shape).items()
        }
        run({**case.inputs, **outputs})
        results.append(outputs)
    assert identities == ["nvcc", "nvrtc"]
    for name, expected in results[0].items():
        difference = (results[1][name] - expected).abs().max() / expected.abs().max()
        assert difference <= TOLERANCES[problem.table], name
