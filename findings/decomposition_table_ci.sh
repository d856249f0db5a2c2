#!/usr/bin/env bash
# torch 2.13.0: a decomposition in torch's global table makes `torch.compile` fail where the variable CI is set.
#
# `torch._decomp.register_decomposition` looks harmless for an operator of one's own, and `torch.onnx.export` needs no
# more. But inductor looks operators up in that table when it has no lowering of its own: it then raises an assertion
# if CI is in the environment, and compiles quietly if it is not. So a project's own machine and its CI differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy 2>/dev/null
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch._decomp import register_decomposition

library = torch.library.Library("own", "DEF")
library.define("twice(Tensor x) -> Tensor")
op = torch.ops.own.twice.default
library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
torch.library.register_fake("own::twice", torch.empty_like, lib=library)
register_decomposition([op])(lambda x: x + x)
try:
    print(torch.compile(lambda x: op(x) + 1)(torch.ones(2)).tolist())
except Exception as error:
    print(type(error).__name__, "a decomposition exists, we should switch to it" in str(error))
PYTHON
run() { env "$@" TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null; }
said="$(run -u CI)
$(run CI=true)"
expected="[3.0, 3.0]
InductorError True"
echo "$said"
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
