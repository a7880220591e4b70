"""What dorac reads of PEFT that is not in ``peft.__all__``, and what to look for where a release has moved it."""

import ast
import importlib
import importlib.util
from pathlib import Path

import peft
from private_names import is_there

PACKAGE = Path(__file__).parents[1] / "dorac"
TOOLS = "bench", "demo", "testing"  # these only measure, show and test

PRIVATE = {
    "the magnitudes and what they compute: look in peft/tuners/lora/dora.py for the layers that are subclassed": (
        "peft.tuners.lora.dora",
        "peft.tuners.lora.dora._DoraConvNdLayer",
        "peft.tuners.lora.dora._DoraConvNdLayer.get_lora_weight.__wrapped__",
        "peft.tuners.lora.dora.DoraEmbeddingLayer.get_lora_weight.__wrapped__",
        "peft.tuners.lora.dora.DoraLinearLayer.get_lora_weight.__wrapped__",
        "peft.tuners.lora.dora.ENABLE_DORA_CACHING",
    ),
    "the variants over them: look in peft/tuners/lora/variants.py for what calls a magnitude": (
        "peft.tuners.lora.variants",
    ),
    "layers with adapters: look in peft/tuners/lora/layer.py, bnb.py and torchao.py for their forward and merge": (
        "peft.tuners.lora.LoraLayer",
        "peft.tuners.lora.bnb",
        "peft.tuners.lora.layer",
        "peft.tuners.lora.layer.Linear",
        "peft.tuners.lora.torchao",
        "peft.tuners.tuners_utils.BaseTunerLayer",
        "peft.tuners.tuners_utils.check_adapters_to_merge",
        "peft.utils.other.AuxiliaryTrainingWrapper",
    ),
    "models with adapters: look in peft/tuners/lora/model.py and tuners_utils.py for what adds, merges and mixes": (
        "peft.tuners.adalora.AdaLoraLayer",
        "peft.tuners.lora.model",
        "peft.tuners.lora.model.LoraModel",
        "peft.tuners.lora.model.LoraModel._cast_adapter_dtype",
        "peft.tuners.lora.model.LoraModel._create_and_replace",
        "peft.tuners.lora.model.LoraModel._create_new_module",
        "peft.tuners.lora.model.LoraModel._enable_peft_forward_hooks",
        "peft.tuners.lora.model.LoraModel._unload_and_optionally_merge",
        "peft.utils._freeze_adapter",
    ),
    "configs: look in peft/tuners/lora/config.py, and in peft/utils/constants.py for default targets": (
        "peft.tuners.lora.LoraConfig",
        "peft.tuners.lora.config.CordaConfig",
        "peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "peft.utils.other.get_pattern_key",
    ),
    "adapters swapped in place: look in peft/utils/hotswap.py": (
        "peft.utils.hotswap",
        "peft.utils.hotswap._convert_scalings_to_tensor",
        "peft.utils.hotswap._update_scaling",
    ),
    "other libraries: look in peft/import_utils.py, peft/utils/integrations.py and transformers_weight_conversion.py": (
        "peft.import_utils.is_bnb_4bit_available",
        "peft.import_utils.is_bnb_available",
        "peft.import_utils.is_transformers_ge_v5",
        "peft.utils.integrations.dequantize_bnb_weight",
        "peft.utils.integrations.dequantize_module_weight",
        "peft.utils.transformers_weight_conversion",
    ),
}
NEEDS_ANOTHER = ("peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion")  # library, to be imported


def moved() -> list[str]:
    """A sentence for each name that this PEFT does not have."""
    return [
        f"peft {peft.__version__} has no {name}; {where}"
        for where, names in PRIVATE.items()
        for name in names
        if not _is_there(name)
    ]


def _is_there(name: str) -> bool:
    if name in NEEDS_ANOTHER:
        return importlib.util.find_spec(name) is not None
    return is_there(name, peft)


def read() -> set[str]:
    """The names in dorac's code, each as far as it goes."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in TOOLS:
            names |= _names(ast.parse(path.read_text(encoding="utf-8")), {})
    return names


def _names(scope: ast.AST, outer: dict[str, str]) -> set[str]:
    """What a scope imports of PEFT, and private attributes of that."""
    inside, scopes = [], []
    pending = list(ast.iter_child_nodes(scope))
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            scopes.append(node)
        else:
            inside.append(node)
            pending += ast.iter_child_nodes(node)
    imports = [n for n in inside if isinstance(n, ast.ImportFrom) and n.module and n.module.split(".")[0] == "peft"]
    own = {a.asname or a.name: f"{node.module}.{a.name}" for node in imports for a in node.names}
    names = {name for name in own.values() if name.removeprefix("peft.") not in peft.__all__}
    imported = outer | own
    if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
        for argument in (*scope.args.args, *scope.args.kwonlyargs):
            imported.pop(argument.arg, None)
    attributes = [node for node in inside if isinstance(node, ast.Attribute)]
    parts = [node.value for node in attributes]
    for node in attributes:
        if node not in parts:
            head, _, rest = ast.unparse(node).partition(".")
            private = [part for part in rest.split(".") if part.startswith("_") or part.isupper()]
            if head in imported and rest.replace(".", "").isidentifier() and private:
                names.add(f"{imported[head]}.{rest}")
    for inner in scopes:
        names |= _names(inner, imported)
    return names
