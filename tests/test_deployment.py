"""Deployed networks: without this package, without Python, and for any number of samples."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from lmkan_gen import LMKAN2DLayer, codegen, convert, deploy, knots, toolchain
from lmkan_gen.deployment import DeployedLayer
from lmkan_gen.device import models
from lmkan_gen.launch.deployed import LayerKind, Library
from lmkan_gen.nn import LMKANMLP, LMKANConv2d, lmkan_layers
from lmkan_gen.problem import DEFAULT_WORKSPACE, TableDtype
from lmkan_gen.toolchain import host

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXAMPLE = Path(__file__).parents[1] / "examples" / "deployment" / "serve.cpp"
H200 = next(d for d in models("sm_90") if "H200" in d.name)
#: the last three were not prepared: filled up, in parts, and filled up in parts
PREPARED, SERVED = [1, 2, 3, 16], (1, 2, 3, 16, 0, 5, 32, 41)


def network(device: str = "cpu") -> nn.Module:
    """A table of every type, one of them not frozen; odd widths."""
    torch.manual_seed(0)
    model = LMKANMLP((5, 12, 7, 9, 3), 6, precondition="relu_first", normalize_input=True, device=device)
    model(torch.randn(100, 5, device=device))
    for layer, dtype in zip(
        lmkan_layers(model.eval()).values(), (torch.int8, torch.float16, torch.bfloat16), strict=False
    ):
        layer.freeze(dtype)
    return model


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """In float64 and plain torch; ends the life of ``model`` as a fast one."""
    y: Tensor = model.double()(x.double())
    return y


@pytest.fixture(scope="module", params=DEVICES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package and its library, inputs, and outputs in float64."""
    folder, device = tmp_path_factory.mktemp("deployed"), request.param
    model = network(device)
    with torch.no_grad():
        deployed = deploy(model, folder / "network.so", PREPARED)
        example = torch.randn(2, 5, device=device)
        program = export(deployed, (example,), dynamic_shapes=({0: Dim("batch")},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "network.pt2"))
        x = torch.randn(max(SERVED), 5, device=device)
        torch.save((x, exact(model, x)), folder / "samples.pt")
    return folder


def run(command: list[str], folder: Path, **options: Any) -> subprocess.CompletedProcess[Any]:
    return subprocess.run(command, cwd=folder, capture_output=True, check=False, **options)


PROCESS = f"""
import sys, torch
torch.ops.load_library("network.so")
model = torch._inductor.aoti_load_package("network.pt2")
x, expected = torch.load("samples.pt")
for batch in {SERVED}:
    y = model(x[:batch])
    assert y.shape == (batch, 3), y.shape
    assert torch.allclose(y.double(), expected[:batch], rtol=0, atol=2e-6 * expected.abs().max()), batch
assert not [name for name in sys.modules if "lmkan" in name]
"""


# the compiler of AOTInductor takes most of the time, ten seconds and more
@pytest.mark.slow
def test_a_process_that_never_imports_the_package(files: Path) -> None:
    done = run([sys.executable, "-P", "-c", PROCESS], files, text=True)
    assert done.returncode == 0, done.stderr
    done = run(
        [sys.executable, "-P", "-c", PROCESS.replace("torch.ops.load", "len or torch.ops.load")], files
    )
    assert b"Could not find schema for lmkan_deployed::forward_" in done.stderr


@pytest.mark.slow
def test_a_cpp_program(files: Path) -> None:
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    link = [
        f"-L{root / 'lib'}",
        f"-Wl,-rpath,{root / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    compiler, _ = host.command()
    done = run([*compiler, "-std=c++20", str(EXAMPLE), *include, *link, "-o", "serve"], files, text=True)
    assert done.returncode == 0, done.stderr
    x, expected = torch.load(files / "samples.pt")
    for batch in SERVED:
        command = ["./serve", "network.so", "network.pt2", "5", str(x.device)]
        done = run(command, files, input=x[:batch].cpu().numpy().tobytes())
        assert done.returncode == 0, done.stderr
        y = torch.frombuffer(bytearray(done.stdout) or bytearray(4), dtype=torch.float32)[: 3 * batch]
        error = (y.view(batch, 3).double() - expected[:batch].cpu()).abs()
        assert batch == 0 or error.max() < 2e-6 * expected.abs().max(), batch
    done = run(["./serve", "nothing.so", "network.pt2", "5"], files, input=b"", text=False)
    assert done.returncode == 1
    assert b"nothing.so: cannot open shared object file" in done.stderr


@pytest.fixture(scope="module", params=DEVICES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, nn.Module]:
    """A frozen network and its deployed copy."""
    model = network(request.param)
    list(lmkan_layers(model).values())[-1].freeze(torch.float32)
    return model, deploy(
        model, tmp_path_factory.mktemp("deployed") / "network.so", [*PREPARED, *range(33, 41)]
    )


def test_prepared_batches_have_the_same_bits(pair: tuple[nn.Module, nn.Module]) -> None:
    """And others the same numbers, in every layout."""
    model, deployed = pair
    device = next(model.buffers()).device
    with torch.no_grad():
        for batch in (*SERVED, 33, 40):
            x = torch.randn(2, batch, 8, device=device)[1, :, 1:6]
            for given in (x, x.contiguous(), x.T.contiguous().T):
                y, expected = deployed(given), model(given)
                assert y.stride() == expected.stride()
                torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
                assert device.type == "cuda" or batch not in PREPARED or torch.equal(y, expected)
        layer = next(iter(lmkan_layers(model).values()))
        served = next(m for m in deployed.modules() if isinstance(m, DeployedLayer))
        for half in (torch.float16, torch.bfloat16):
            y, expected = served(x.T.to(half)), layer(x.T.to(half))
            assert y.dtype == half
            torch.testing.assert_close(y, expected)


def test_eight_threads_call_a_cold_library(pair: tuple[nn.Module, nn.Module]) -> None:
    """Each of them loads kernels, or waits for one that does."""
    model, deployed = pair
    x = torch.randn(39, 5, device=next(model.buffers()).device)
    start = threading.Barrier(8)

    def call(batch: int) -> Tensor:
        start.wait()
        with torch.no_grad():
            return torch.stack([deployed(x[:batch]) for _ in range(20)])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, [34, 35, 36, 37, 34, 35, 36, 37]))
    with torch.no_grad():
        for y in found:
            expected = model(x[: y.shape[1]]).expand_as(y)
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_what_does_not_belong_together_is_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    layer = next(m for m in pair[1].modules() if isinstance(m, DeployedLayer))
    borders, *forms = layer.buffers()
    x = torch.randn(5, 4, device=borders.device)
    call: Callable[..., Tensor] = getattr(torch.ops.lmkan_deployed, layer._operator)
    assert call(x, borders, forms, 0).shape == (12, 4)
    shifted = torch.empty(forms[0].nbytes + 4, dtype=torch.uint8, device=x.device)[4:]
    for words, arguments in {
        r"x must be float32 \[5, batch\], got \[4, 4\] of 4 bytes each": (x[:4], borders, forms, 0),
        r"x must be float32 \[5, batch\], got \[5, 4\] of 8": (x.double(), borders, forms, 0),
        r"x must be float32 \[5, batch\], got \[5\] of 4": (x[:, 0], borders, forms, 0),
        "no such layer": (x, borders, forms, 4),
        "borders are not the knots": (x, borders[1:], forms, 0),
        "the tables are not those": (x, borders, forms[1:], 0),
        "are not those of the layer": (x, borders, [forms[0][1:], *forms[1:]], 0),
        "multiple of 16 bytes": (x, borders, [shifted, *forms[1:]], 0),
    }.items():
        with pytest.raises(RuntimeError, match=f"lmkan_gen: .*{words}"):
            call(*arguments)


def test_two_libraries_and_one_twice(tmp_path: Path) -> None:
    """In one process; the second copy of a library leaves the work to the first."""
    x = torch.randn(4, 6)
    layers = [LMKAN2DLayer(4, 4, outputs).eval() for outputs in (2, 3, 3)]
    deployed = [deploy(layer, tmp_path / f"{i}.so", [6]) for i, layer in enumerate(layers)]
    names = {part._operator for part in deployed if isinstance(part, DeployedLayer)}
    assert len(names) == 2
    for layer, part in zip(layers, deployed, strict=True):
        assert torch.equal(part(x), layer(x))


def test_a_deployed_network_stays_as_it_is(tmp_path: Path) -> None:
    layer = LMKAN2DLayer(4, 4, 3)
    deployed = deploy(layer, tmp_path / "layer.so", [6])
    x = torch.randn(4, 6)
    expected = deployed(x)
    assert layer.training
    assert not deployed.training
    torch.save(deployed, tmp_path / "layer.pt")
    assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=False)(x), expected)
    with pytest.raises(RuntimeError, match="deployed networks are for inference"):
        deployed(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        layer.func_parameter.zero_()
    assert torch.equal(deployed(x), expected)
    assert expected.any()


def test_convolutions_and_converted_networks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(4 * 3 * 3, 8), nn.ReLU(), nn.Linear(8, 2))
    model = nn.Sequential(LMKANConv2d(3, 4, 3, 5, stride=2, padding=1), convert(body, 6)).eval()
    images = torch.randn(7, 3, 5, 5)
    deployed = deploy(model, tmp_path / "network.so", [7, 63])
    assert not lmkan_layers(deployed)
    with torch.no_grad():
        for count in (7, 2):
            torch.testing.assert_close(deployed(images[:count]), model(images[:count]), rtol=1e-5, atol=1e-6)


def test_usage(tmp_path: Path) -> None:
    layer, file = LMKAN2DLayer(4, 4, 3), tmp_path / "layer.so"
    cases: dict[str, tuple[type[Exception], nn.Module, Any]] = {
        "batches is empty": (ValueError, layer, []),
        "batches holds 0; the least is 1": (ValueError, layer, range(3)),
        "must hold integers, got 2.5": (TypeError, layer, [1, 2.5]),
        "Linear holds no LMKAN2DLayer": (ValueError, nn.Linear(2, 2), [1]),
        "'0' is float64": (ValueError, nn.Sequential(LMKAN2DLayer(4, 4, 3, dtype=torch.float64)), [1]),
        "on cpu, meta": (ValueError, nn.Sequential(layer, LMKAN2DLayer(4, 4, 3, device="meta")), [1]),
        "device meta is not supported": (ValueError, LMKAN2DLayer(4, 4, 3, device="meta"), [1]),
        "'hooked' has forward hooks": (ValueError, nn.ModuleDict({"hooked": hooked()}), [1]),
    }
    for words, (kind, model, batches) in cases.items():
        with pytest.raises(kind, match=words):
            deploy(model, file, batches)
    with pytest.raises(FileNotFoundError):
        deploy(layer, tmp_path / "nowhere" / "layer.so", [1])
    assert not list(tmp_path.iterdir())


def hooked() -> nn.Module:
    layer = LMKAN2DLayer(4, 4, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


def test_a_compiler_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LMKAN2DLayer(4, 4, 3).eval()
    real = codegen.render
    monkeypatch.setattr(
        codegen, "render", lambda spec: "no C++" if spec.template == "deployed.cpp.j2" else real(spec)
    )
    with pytest.raises(toolchain.CompileError, match=r"deployed.cpp.j2 did not compile: .*error"):
        deploy(layer, tmp_path / "layer.so", [1])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def _kernels_of_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Library, "_images", lambda self: iter([b"a cubin"] * len(self._specs)))


@pytest.mark.usefixtures("_kernels_of_no_compiler")
@pytest.mark.parametrize("table", TableDtype)
def test_recipes_for_gpus_serve_every_batch_asked_for(table: TableDtype) -> None:
    kinds = [LayerKind(512, 512, 18, table), LayerKind(5, 7, 4, table)]
    batches = [*range(1, 200), 1000, 4096, 70000]
    library = Library(kinds, batches, H200, False, DEFAULT_WORKSPACE)
    for kind in kinds:
        for strided in (False, True):
            served = library._served(kind, batches, strided)
            assert [batch for one in served for batch in one.batches] == batches
            assert len(served) < len(batches) / 2
            assert all(a.batches[-1] < b.batches[0] for a, b in pairwise(served))
            forms = {form for one in served for form in one.written.forms}
            assert forms == set(library.forms[kind])


@pytest.mark.usefixtures("_kernels_of_no_compiler")
def test_a_library_for_another_device_says_so(tmp_path: Path) -> None:
    kind = LayerKind(4, 3, 4, TableDtype.FLOAT16)
    library = Library([kind], [1], H200, False, DEFAULT_WORKSPACE)
    library.save(tmp_path / "gpu.so")
    torch.ops.load_library(tmp_path / "gpu.so")
    operator = getattr(torch.ops.lmkan_deployed, library.name)
    with pytest.raises(RuntimeError, match="this library has kernels for sm_90, x is not on a GPU"):
        operator(torch.randn(4, 2), knots(4), [], 0)
