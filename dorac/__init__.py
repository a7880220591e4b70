"""dorac: DoRA (weight-decomposed low-rank adaptation) for PyTorch, functional and compile-first.

Every name below has its reference in its docstring, ``help(dorac.apply_dora)``; pages on models, PEFT, files, costs and
derivations are in ``dorac/docs``, beside this file.
"""

from dorac import files, functional, nn, ops
from dorac.apply import apply_dora
from dorac.caching import NormCache, cache_norms
from dorac.checkpoint import load_adapter, save_adapter
from dorac.fusing import Fusion, fuse, unfuse
from dorac.idle import find_idle
from dorac.merging import merge, unmerge
from dorac.named import active_adapter, adapters, add_adapter, delete_adapter, set_adapter
from dorac.outputs import save_outputs
from dorac.switching import base_model, disabled, set_strength
from dorac.trained import parameter_groups, print_trainable_parameters

__version__ = "0.1.0"
__all__ = [
    "Fusion",
    "NormCache",
    "active_adapter",
    "adapters",
    "add_adapter",
    "apply_dora",
    "base_model",
    "cache_norms",
    "delete_adapter",
    "disabled",
    "files",
    "find_idle",
    "functional",
    "fuse",
    "load_adapter",
    "merge",
    "nn",
    "ops",
    "parameter_groups",
    "print_trainable_parameters",
    "save_adapter",
    "save_outputs",
    "set_adapter",
    "set_strength",
    "unfuse",
    "unmerge",
]
