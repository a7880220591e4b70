"""The layering rule, read from the imports; and what `import dorac` may touch."""

import ast
import contextlib
import graphlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import dorac

PACKAGE = Path(dorac.__file__).parent
# floor of each module, from below; a module imports only from floors beneath it or from its own topic
FLOORS = {
    "bounded": 0,
    "callers": 0,
    "dense": 0,
    "lora_config": 0.5,
    "names": 0,
    "numerics": 0,
    "reference": 0,
    "stock_peft": 0,
    "weight_reads": 0,
    "kernels": 1,
    "ops": 2,
    "checks": 1,
    "functional": 3,
    "magnitudes": 3,
    "undo": 3,
    "offload": 3.5,
    "hooks": 3.6,
    "nn": 4,
    "ranks": 4.5,
    "places": 4.5,
    "notices": 5,
    "parallel": 5,
    "peft": 5,
    "targets": 5,
    "hub": 0,
    "pretrained": 5,
    "trained": 5,
    "wrapped": 5.5,
    "apply": 6,
    "merging": 6,
    "adapter_config": 7,
    "named": 7,
    "caching": 7,
    "files": 7.5,
    "checkpoint": 8,
    "fusing": 7,
    "idle": 7,
    "outputs": 0,
    "switching": 7,
    "packed": 0,
    "testing": 8,
    "cli": 8,
    "quantise": 8,
    "commands": 9,
    "__main__": 10,
    "demo": 9,
    "bench": 9,
}


def imported_topics(path: Path) -> set[str]:
    topics = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            topics |= {a.name.split(".")[1] for a in node.names if a.name.startswith("dorac.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dorac":
            parts = node.module.split(".")
            topics |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
    return topics


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    topic = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if topic == "__init__":
        return
    for other in imported_topics(path) & set(FLOORS):
        assert other == topic or FLOORS[other] < FLOORS[topic], f"{topic} imports {other}"
    if topic == "reference":
        assert not imported_topics(path)


def imported_modules(tree: ast.AST) -> set[str]:
    """What is imported when the module is: nothing inside functions, nothing for type checkers alone."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {name for a in node.names for name in (node.module, f"{node.module}.{a.name}")}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        found |= imported_modules(node)
    return found


def test_imports_go_in_no_circle():
    """Of modules; a package's own file, which imports what it holds, is none."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in paths}
    graph = {name: imported_modules(ast.parse(path.read_text())) & names.keys() for name, path in names.items()}
    assert graph["dorac.nn.layer"] >= {"dorac.nn.norm_cache", "dorac.nn.stated"}
    order = tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) == len(names)


def test_every_module_has_a_floor():
    topics = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py")}
    assert topics - {"__init__"} <= set(FLOORS)


def run_fresh(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_import_touches_neither_triton_nor_cuda():
    run_fresh(
        "import sys\n"
        "import torch\n"
        "torch_alone = set(sys.modules)\n"
        "import dorac\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - torch_alone}\n"
        "assert not new & {'triton', 'peft', 'transformers', 'matplotlib', 'tqdm'}, new\n"
        "assert not {'dorac.demo', 'dorac.peft', 'dorac.testing'} & set(sys.modules)\n"
        "assert not torch.cuda.is_initialized()\n"
    )


def test_works_where_triton_is_missing():
    run_fresh(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, dorac\n"
        "layer = dorac.nn.DoraLinear(torch.nn.Linear(6, 5), r=2, init_lora_weights=False)\n"
        "layer(torch.randn(3, 6)).sum().backward()\n"
        "assert layer.lora_magnitude_vector.grad.abs().sum() > 0\n"
        "from dorac.testing import quantised_layers\n"
        "model = torch.nn.Sequential(quantised_layers.Linear4bit(64, 5, bias=False)).to('cpu')\n"
        "dorac.apply_dora(model, ['0'], r=2, init_lora_weights=False)\n"
        "for prepare in (lambda model: None, dorac.cache_norms, dorac.save_outputs):\n"
        "    prepare(model)\n"
        "    model(torch.randn(3, 64)).sum().backward()\n"
        "assert model[0].lora_magnitude_vector.grad.abs().sum() > 0\n"
    )


def declared() -> set[str]:
    """The distributions that ``pip install`` brings with the package."""
    waiting = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    found = set()
    while waiting:
        requirement = waiting.pop()
        name = _canonical(re.match(r"[\w.-]+", requirement)[0])
        if name not in found and "extra ==" not in requirement:
            found.add(name)
            with contextlib.suppress(metadata.PackageNotFoundError):
                waiting += metadata.requires(name) or []
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_works_with_what_it_declares(tmp_path):
    """An adapter is trained, saved, loaded, converted and merged where nothing else is installed."""
    if not (PACKAGE.parent / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    own = declared() | {"dorac"}
    missing = [m for m, of in metadata.packages_distributions().items() if own.isdisjoint(map(_canonical, of))]
    assert "pytest" in missing
    run_fresh(
        "import sys\n"
        f"sys.modules |= dict.fromkeys({missing})\n"
        "import torch, dorac\n"
        "from dorac.commands.main import main\n"
        f"folder = {str(tmp_path)!r}\n"
        "model = torch.nn.Sequential(torch.nn.Linear(6, 5))\n"
        "dorac.apply_dora(model, ['0'], r=2, init_lora_weights=False)\n"
        "dorac.cache_norms(model)\n"
        "optimizer = torch.optim.AdamW(dorac.parameter_groups(model, lr=0.1))\n"
        "model(torch.randn(3, 6)).sum().backward()\n"
        "optimizer.step()\n"
        "dorac.save_adapter(model, f'{folder}/adapter')\n"
        "assert dorac.load_adapter(model, f'{folder}/adapter') == ['0']\n"
        "convert = ['convert', f'{folder}/adapter', f'{folder}/other.safetensors', '--to', 'lycoris']\n"
        "assert main(convert) == main(['check', f'{folder}/other.safetensors']) == 0\n"
        "assert type(dorac.merge(model, unload=True)[0]) is torch.nn.Linear\n"
    )


def test_public_names():
    assert set(dorac.__all__) <= set(dir(dorac))
    for name in dorac.functional.__all__:
        assert getattr(dorac.functional, name).__doc__, name
    assert (PACKAGE / "py.typed").exists()
