#!/usr/bin/env bash
# torch 2.13.0: DTensor reports the shape of an earlier call for an operator with a bool argument.
#
# `torch.distributed.tensor.experimental.register_sharding` tells calls of an operator apart by its first int
# argument and those after it. A bool is none: where one decides the shape of the output, the second call reports
# the global shape of the first, while its local tensor has its own. The same argument declared `int` is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy 2>/dev/null
cat > "$folder/run.py" <<'PYTHON'
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding

os.environ.update(RANK="0", WORLD_SIZE="1")
store = dist.FileStore(os.environ["STORE"], 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


def part(x, keep):
    return x.clone() if keep else x.new_empty(0)


for kind in ("bool", "int"):
    library = torch.library.Library(f"of_{kind}", "DEF")
    library.define(f"part(Tensor x, {kind} keep) -> Tensor")
    op = getattr(torch.ops, f"of_{kind}").part.default
    library.impl("part", part, "CompositeExplicitAutograd")
    torch.library.register_fake(f"of_{kind}::part", part, lib=library)
    register_sharding(op)(lambda x, keep: [([Replicate()], [Replicate(), None])])
    x = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
    kept, dropped = op(x, True), op(x, False)
    print(kind, list(kept.shape), list(dropped.shape), list(dropped.to_local().shape))
dist.destroy_process_group()
PYTHON
said=$(STORE="$folder/store" "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
expected="bool [4, 3] [4, 3] [0]
int [4, 3] [0] [0]"
echo "$said"
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
