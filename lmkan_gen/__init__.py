"""lmKAN layers with generated, auto-tuned kernels for CUDA and CPUs.

Importing this touches neither CUDA nor a compiler; kernels are made when a layer is first called.
"""

from lmkan_gen.conversion import convert, fold, refine
from lmkan_gen.decomposition import decompositions
from lmkan_gen.deployment import deploy
from lmkan_gen.dispatch import set_workspace_limit
from lmkan_gen.flops import register_formulas
from lmkan_gen.grid import knots
from lmkan_gen.layer import LMKAN2DLayer
from lmkan_gen.log import follow_environment
from lmkan_gen.model_tuning import tune
from lmkan_gen.ops import lmkan
from lmkan_gen.regularization import hessian_regularization
from lmkan_gen.unloading import clear

__version__ = "0.1.0"

register_formulas()
follow_environment()

__all__ = [
    "LMKAN2DLayer",
    "__version__",
    "clear",
    "convert",
    "decompositions",
    "deploy",
    "fold",
    "hessian_regularization",
    "knots",
    "lmkan",
    "refine",
    "set_workspace_limit",
    "tune",
]
