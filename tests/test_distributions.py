"""The wheel and the source distribution, as ``python -m build`` makes them, where there is no checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import dorac

ROOT = Path(dorac.__file__).parents[1]
SMOKE = """
import importlib.util, sys
from importlib import resources
import torch
from torch import nn
import dorac
from dorac.testing import quantised_layers

assert dorac.__file__.startswith(sys.argv[1]), dorac.__file__
package = resources.files("dorac")
for shipped in ("py.typed", "docs/peft.md", "docs/CHANGELOG.md", "bench/pictures/cost-dark.svg"):
    assert package.joinpath(*shipped.split("/")).is_file(), shipped
drawn = torch.randn
layers = [
    (nn.Linear(6, 5), "DoraLinear", drawn(3, 6)),
    (nn.Embedding(7, 5), "DoraEmbedding", torch.tensor([1, 2, 6])),
    (nn.Conv1d(3, 5, 3), "DoraConv1d", drawn(2, 3, 6)),
    (nn.Conv2d(3, 5, 3), "DoraConv2d", drawn(2, 3, 6, 6)),
    (nn.Conv3d(3, 5, 3), "DoraConv3d", drawn(2, 3, 6, 6, 6)),
    (quantised_layers.Linear4bit(64, 5).to("cpu"), "DoraQuantLinear", drawn(3, 64)),
]
if importlib.util.find_spec("transformers"):
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = transformers.MixtralConfig(hidden_size=6, intermediate_size=5, num_local_experts=2, num_experts_per_tok=1)
    experts = MixtralExperts(config)
    for p in experts.parameters():
        nn.init.normal_(p)
    routed = drawn(3, 6), torch.tensor([[0], [1], [0]]), torch.ones(3, 1)
    layers += [(transformers.pytorch_utils.Conv1D(5, 6), "DoraLinear", drawn(3, 6)), (experts, "DoraExperts", routed)]
for layer, kind, x in layers:
    model = nn.Sequential(layer)
    dorac.apply_dora(model, ["0"], r=2, init_lora_weights=False)
    assert type(model[0]).__name__ == kind
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, 0.1)
    model[0](*(x if isinstance(x, tuple) else (x,))).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(trained, before, strict=True)), kind
print(*(kind for _, kind, _ in layers))
"""


def files(folder: str) -> set[str]:
    """What git keeps of the folder."""
    names = subprocess.run(["git", "-C", ROOT, "ls-files", folder], capture_output=True, text=True, check=True)
    return set(names.stdout.split())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, made from the source distribution, and this."""
    pytest.importorskip("build")
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "built"))
    for name in files("."):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, source], cwd=out, check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.full
def test_what_is_in_them(built):
    wheel, sdist = built
    package = files("dorac")
    assert "dorac/py.typed" in package
    with zipfile.ZipFile(wheel) as file:
        assert {name for name in file.namelist() if ".dist-info/" not in name} == package
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert package | {"pyproject.toml", "README.md"} <= names


@pytest.mark.full
@pytest.mark.parametrize("kind", ["wheel", "source distribution"])
def test_installed_without_the_checkout(kind, built, tmp_path):
    """One training step of each kind of layer, and the commands, from an empty folder."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    subprocess.run([*install, built[kind != "wheel"]], check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", SMOKE, str(site)).startswith("DoraLinear DoraEmbedding DoraConv1d")
    assert "merge" in run("-m", "dorac", "--help")
    if find_spec("matplotlib"):
        assert run("-m", "dorac.bench", "picture", str(tmp_path)).count(".svg") == 2
    assert "norm bf16 r384" in run("-m", "dorac.bench", "card", "--device", "cpu", "--target", "sm_90")
    assert list(empty.iterdir()) == []
