#!/usr/bin/env bash
# torch 2.13.0: constants of an AOTInductor package for CPUs start at multiples of 16 bytes, not of 64.
#
# Its runtime says "use 64-alignment (use something >=64) for better performance on CPU", and pads every constant to
# that. But it pads offsets into memory that malloc gave: any multiple of 16, and from 32 MiB on 16 bytes behind a page.
# Memory of torch's own allocator is at multiples of 64. So an operator of one's own that loads registers of 32 or 64
# bytes from an aligned address works with every tensor, eager and compiled, and not with constants of a package.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy setuptools 2>/dev/null
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch

library = torch.library.Library("own", "DEF")
library.define("address(Tensor x) -> Tensor")
library.impl("address", lambda x: torch.tensor(x.data_ptr()), "CPU")
torch.library.register_fake("own::address", lambda x: x.new_empty((), dtype=torch.int64), lib=library)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(10 << 20))

    def forward(self, x):
        return torch.ops.own.address(self.table) + x


model, zero = Model(), torch.tensor(0)
program = torch.export.export(model, (zero,))
path = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
for name, run in {"eager": model, "compiled": torch.compile(model), "package": torch._inductor.aoti_load_package(path)}.items():
    print(name, run(zero).item() % 64)
PYTHON
said="$(TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/run.py" "$folder/model.pt2" 2>/dev/null)"
expected="eager 0
compiled 0
package 16"
echo "$said"
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
