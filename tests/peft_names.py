"""Where dorac reads what is not in ``peft.__all__``, and what to look for where a release has moved it."""

import ast
import importlib.util
import re
from pathlib import Path

import peft
from private_names import is_there

from dorac import stock_peft

PACKAGE = Path(stock_peft.__file__).parent
TOOLS = "bench", "demo", "testing"  # these only measure, show and test
ROOM = "dorac.stock_peft"

WHERE = {
    "the magnitudes and what they compute: look in peft/tuners/lora/dora.py for the layers that are subclassed": (
        "peft.tuners.lora.dora",
    ),
    "the variants over them: look in peft/tuners/lora/variants.py for what calls a magnitude": (
        "peft.tuners.lora.variants",
    ),
    "layers with adapters: look in peft/tuners/lora/layer.py, bnb.py and torchao.py for their forward and merge": (
        "peft.tuners.lora",
        "peft.tuners.lora.bnb",
        "peft.tuners.lora.layer",
        "peft.tuners.lora.torchao",
        "peft.tuners.tuners_utils",
    ),
    "models with adapters: look in peft/tuners/lora/model.py and tuners_utils.py for what adds, merges and mixes": (
        "peft.tuners.adalora",
        "peft.tuners.lora.model",
    ),
    "configs: look in peft/tuners/lora/config.py, and in peft/utils/constants.py for default targets": (
        "peft.tuners.lora.config",
        "peft.utils",
        "peft.utils.other",
    ),
    "adapters swapped in place: look in peft/utils/hotswap.py": ("peft.utils.hotswap",),
    "other libraries: look in peft/import_utils.py, peft/utils/integrations.py and transformers_weight_conversion.py": (
        "peft.import_utils",
        "peft.utils.integrations",
        "peft.utils.transformers_weight_conversion",
    ),
}
NEEDS_ANOTHER = ("peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion")  # library, to be imported


def modules() -> set[str]:
    """PEFT's, that the names in dorac's room are in."""
    return {place.partition(":")[0] for place in stock_peft.PLACES.values()}


def moved() -> list[str]:
    """A sentence for each name that this PEFT does not have."""
    sentences = {module: where for where, modules in WHERE.items() for module in modules}
    return [
        f"peft {peft.__version__} has no {place.replace(':', '.')}; {sentences[place.partition(':')[0]]}"
        for place in stock_peft.PLACES.values()
        if not _is_there(*place.split(":"))
    ]


def _is_there(module: str, name: str) -> bool:
    if module not in NEEDS_ANOTHER:
        return is_there(f"{module}.{name}", peft)
    spec = importlib.util.find_spec(module)
    return spec is not None and bool(re.search(rf"^\s*(def|class) {name}\b", Path(spec.origin).read_text(), re.M))


def read(folder: Path = PACKAGE) -> tuple[set[str], dict[str, set[str]]]:
    """What the files take of the room, and what is private of PEFT in the others, by file."""
    taken, elsewhere = set(), {}
    for path in folder.rglob("*.py"):
        if path.relative_to(folder).parts[0] not in TOOLS and path.relative_to(folder) != Path("stock_peft.py"):
            names = _names(ast.parse(path.read_text(encoding="utf-8")))
            taken |= {name.removeprefix(f"{ROOM}.") for name in names if name.startswith(f"{ROOM}.")}
            if private := {name for name in names if _is_private(name)}:
                elsewhere[str(path.relative_to(folder))] = private
    return taken, elsewhere


def _is_private(name: str) -> bool:
    """Whether a name is PEFT's and not in ``peft.__all__``, or leads past what is: of the room's too."""
    if name.startswith(f"{ROOM}."):
        rest = name.removeprefix(f"{ROOM}.").split(".")[1:]
    else:
        first, *rest = name.removeprefix("peft.").split(".")
        if first not in peft.__all__:
            return True
    return any(part.startswith("_") or part.isupper() for part in rest)


def _names(tree: ast.Module) -> set[str]:
    """What a file imports of PEFT and of the room, as far as it goes in it, and names of PEFT's in strings."""
    roots = "peft", ROOM
    imported, names = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in roots or node.module in roots or node.module.startswith("peft."):
                    imported[alias.asname or alias.name] = full
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "peft" or alias.name == ROOM:
                    imported[alias.asname or "peft"] = alias.name if alias.asname else "peft"
                    names.add(alias.name)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"peft(\.\w+)+(:[\w.]*)?", str(node.value)):
            names.add(node.value.replace(":", "."))
    names.update(imported.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            if head in imported and rest.replace(".", "").isidentifier():
                names.add(f"{imported[head]}.{rest}")
    return names - set(roots)
