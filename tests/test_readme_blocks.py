"""Every Python block of README and the pages runs as written, in an empty folder; their signatures are the functions'.

What a block takes for granted is set up by its prelude here. CI runs the blocks in this process, from the source tree;
under ``full`` each runs in a process of its own, from an installed wheel and with the real compiler.
"""

import functools
import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
from pages import PAGES, blocks, sections

import dorac

ELSEWHERE = ("Trainer", "TRL")  # run by test_readme.py
BLOCKS = {key: code for key, code in blocks().items() if key.rpartition(", ")[0] not in ELSEWHERE}

SMALL = "model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))\n"
ADAPTED = SMALL + "dorac.apply_dora(model, 'all-linear', r=2, init_lora_weights=False)\n"
LINEAR = """
weight, bias, scaling = torch.randn(8, 6), torch.randn(8), 1.5
lora_A, lora_B, magnitude = torch.randn(2, 6), torch.randn(8, 2), torch.rand(8)
x = torch.randn(5, 6)
"""
TRAIN = """
def train(model, optimizer=None):
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = [p.detach().clone() for group in optimizer.param_groups for p in group['params']]
    batch = {'input_ids': torch.arange(6).reshape(2, 3)} if hasattr(model, 'config') else {'input': torch.randn(3, 6)}
    outputs = model(**batch)
    getattr(outputs, 'logits', outputs).float().square().mean().backward()
    optimizer.step()
    after = [p for group in optimizer.param_groups for p in group['params']]
    assert before
    assert not all(torch.equal(a, b) for a, b in zip(before, after))
"""
LLAMA = """
import transformers
config = transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2,
    num_key_value_heads=1, vocab_size=32, use_cache=False, bos_token_id=None, eos_token_id=None)
model = transformers.LlamaForCausalLM(config)
"""
MODEL_FILES = LLAMA + "name = 'base'\nmodel.save_pretrained(name)\n"
MLP = """
class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
    def forward(self, x):
        return self.down(self.up(x).relu())

import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
torch.distributed.init_process_group('gloo', init_method='file://' + __import__('os').getcwd() + '/store', rank=0,
    world_size=1)
mesh = init_device_mesh('cpu', (1,))
model = Mlp()
"""
# A block's key is the heading that it stands under and its number there. Names that the block leaves are checked after.
PRELUDES = {
    "dorac, 1": SMALL + TRAIN,
    "All of it in numbers, 1": "",
    "The functions, 1": LINEAR,
    "The functions, 2": LINEAR
    + "adapters = [(lora_A, lora_B, magnitude, 1.5), (lora_A[:1], lora_B[:, :1], magnitude, 2.0)]\n"
    + "index = torch.tensor([0, 1, -1, 1, 0])\n",
    "The functions, 3": LINEAR + "linear, Adapter, x = torch.nn.Linear(6, 8), dorac.functional.Adapter, x[:3]\n",
    "Per-sample gradients, 1": ADAPTED + "inputs, targets = torch.randn(5, 6), torch.randn(5, 4)\n",
    "An ensemble of adapters over one base, 1": ADAPTED
    + "inputs, directories = torch.randn(5, 6), ['a', 'b', 'c']\n"
    + "for directory in directories:\n    dorac.save_adapter(model, directory)\n",
    "With PEFT's config, 1": "import peft\n" + LLAMA,
    "From an adapter to a plain model, 1": MODEL_FILES
    + "dorac.apply_dora(model, 'all-linear', r=2, init_lora_weights=False)\n"
    + "dorac.save_adapter(model, 'adapter')\nadapted = model\n",
    "Several adapters, 1": SMALL
    + "import copy\nbase = copy.deepcopy(model)\ndorac.apply_dora(base, 'all-linear', r=4, init_lora_weights=False)\n"
    + "dorac.save_adapter(base, 'adapter')\n",
    "Offloaded models, 1": MODEL_FILES + TRAIN,
    "Files of every family, 1": SMALL
    + "from safetensors.torch import save_file\n"
    + "tensors = {'0.lora_A.weight': torch.randn(2, 6), '0.lora_B.weight': torch.randn(8, 2)}\n"
    + "save_file(tensors | {'0.magnitude': torch.rand(8)}, 'lora.safetensors')\n",
    "Fused blocks, 1": LLAMA + "dorac.apply_dora(model, 'all-linear', r=2, init_lora_weights=False)\n",
    "QDoRA, 1": MODEL_FILES + TRAIN,
    "PEFT, 1": SMALL + TRAIN,
    "One adapter per row, 1": SMALL
    + "import dorac.peft, peft\n"
    + "config = peft.LoraConfig(use_dora=True, target_modules=['0', '2'], init_lora_weights=False)\n"
    + "model = peft.get_peft_model(model, config, adapter_name='ann')\nmodel.add_adapter('bob', config)\n"
    + "dorac.peft.enable(model.eval())\nx = torch.randn(4, 6)\n",
    "Block by block, 1": LLAMA + "dorac.apply_dora(model, 'all-linear', r=2)\n",
    "Blocks of different ranks, 1": LLAMA + "dorac.apply_dora(model, 'all-linear', r=2, rank_pattern={'q_proj': 3})\n",
    "Checkpointing that keeps what is expensive, 1": ADAPTED,
    "Norms once per optimizer step, 1": ADAPTED
    + "optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])\n"
    + "steps = [[(torch.randn(5, 6), torch.randn(5, 4))] * 2] * 2\n",
    "Export, 1": ADAPTED + "x = torch.randn(3, 5, 6)\n",
    "Tensor parallelism, 1": MLP,
    "FSDP2, 1": MLP + "dorac.apply_dora(model, ['up', 'down'], r=4)\n",
}
AFTER = {
    "dorac, 1": "assert names == ['0', '2']\nfresh = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), "
    "torch.nn.Linear(8, 4))\nassert dorac.load_adapter(fresh, 'adapter') == names",
    "All of it in numbers, 1": "assert not any(torch.allclose(exact[name], paper[name]) for name in ('A', 'B'))",
    "The functions, 1": "assert y.shape == (5, 8)",
    "The functions, 2": """
A, B, m, s = adapters[1]
alone = dorac.functional.dora_linear(x, weight, A, B, m, bias, scaling=s)
torch.testing.assert_close(y[[1, 3]], alone[[1, 3]])
torch.testing.assert_close(y[2], torch.nn.functional.linear(x[2], weight, bias))
""",
    "The functions, 3": "assert torch.equal(y[1], linear(x)[1])\nassert not torch.equal(y[0], linear(x)[0])",
    "Per-sample gradients, 1": "assert gradients['0.lora_A'].shape == (5, 2, 6)",
    "An ensemble of adapters over one base, 1": "assert outputs.shape == (3, 5, 4)",
    "With PEFT's config, 1": TRAIN + "train(model, optimizer)\nassert len(optimizer.param_groups) == 3",
    "From an adapter to a plain model, 1": """
ids = torch.arange(6).reshape(2, 3)
loaded = transformers.AutoModelForCausalLM.from_pretrained('merged')
assert not any(type(m).__module__.startswith('dorac') for m in loaded.modules())
torch.testing.assert_close(loaded.eval()(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-5)
""",
    "Several adapters, 1": """
assert (dorac.adapters(model), dorac.active_adapter(model), model[0].r) == (['default', 'b'], 'b', 8)
x, fresh = torch.randn(3, 6), copy.deepcopy(base)
dorac.load_adapter(fresh, 'saved')
assert torch.equal(fresh(x), base(x))
""",
    "Offloaded models, 1": "train(model)",
    "Files of every family, 1": "assert (names, contents.format, layer.scaling) == (['0'], 'ai-toolkit', 8.0)",
    "Fused blocks, 1": "assert not report.left\nassert 'layers.1.mlp' in ' '.join(report.fused)",
    "QDoRA, 1": "assert any('Linear4bit' in type(m).__name__ for m in model.modules())",
    "PEFT, 1": "train(model)",
    "One adapter per row, 1": """
for name, rows in (('ann', [0, 3]), ('bob', [1])):
    model.set_adapter(name)
    torch.testing.assert_close(y[rows], model(x[rows]))
with model.disable_adapter():
    torch.testing.assert_close(y[2], model(x)[2])
""",
    "Block by block, 1": TRAIN + "train(model)",
    "Blocks of different ranks, 1": TRAIN + "train(model)",
    "Checkpointing that keeps what is expensive, 1": "run(torch.randn(3, 6)).sum().backward()",
    "Norms once per optimizer step, 1": "cache.check()",
    "Export, 1": "y = torch.export.load('model.pt2').module()(x)\ntorch.testing.assert_close(y, model(x))\n"
    "torch.testing.assert_close(torch._inductor.aoti_load_package('compiled.pt2')(x), y)",
    "Tensor parallelism, 1": "model(torch.randn(3, 6)).sum().backward()",
    "FSDP2, 1": "model(torch.randn(3, 6)).sum().backward()",
}
NEEDS = {
    "With PEFT's config, 1": ["peft", "transformers"],
    "From an adapter to a plain model, 1": ["transformers"],
    "Offloaded models, 1": ["accelerate", "transformers"],
    "Fused blocks, 1": ["transformers"],
    "QDoRA, 1": ["bitsandbytes", "transformers", "accelerate"],
    "PEFT, 1": ["peft"],
    "One adapter per row, 1": ["peft"],
    "Block by block, 1": ["transformers"],
    "Blocks of different ranks, 1": ["transformers"],
}
# Not in this process: they compile a package, start a process group, or change what is global.
ALONE = ("Export, 1", "Tensor parallelism, 1", "FSDP2, 1", "Blocks of different ranks, 1", "PEFT, 1")


def script(block: str) -> str:
    return "\n".join(["import torch, dorac", PRELUDES[block], BLOCKS[block], AFTER[block]])


def test_every_block_is_run():
    assert set(BLOCKS) == set(PRELUDES) == set(AFTER)
    assert {f"{heading}, 1" for heading in ELSEWHERE} <= set(blocks())


@pytest.mark.parametrize("block", [b for b in BLOCKS if b not in ALONE])
def test_blocks(block, tmp_path, monkeypatch):
    for module in NEEDS.get(block, []):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    exec(script(block), {"__name__": "__main__"})


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder in which a wheel of the package is installed."""
    source = os.path.dirname(os.path.dirname(dorac.__file__))
    copy, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("dorac", "pyproject.toml", "README.md"):
        subprocess.run(["cp", "-r", os.path.join(source, name), copy], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(copy)]
    subprocess.run(pip, check=True)
    return target


@pytest.mark.full
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_from_an_installed_wheel(block, installed, tmp_path):
    for module in NEEDS.get(block, []):
        pytest.importorskip(module)
    where = f"import dorac\nassert dorac.__file__.startswith({str(installed)!r}), dorac.__file__\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    run = [sys.executable, "-W", "error::UserWarning:dorac", "-c", where + script(block)]
    result = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def parameters(function) -> list[tuple]:
    signature = inspect.signature(function)
    return [(p.name, p.kind, None if p.default is p.empty else repr(p.default)) for p in signature.parameters.values()]


def test_signatures():
    """Those below the table of the functions are whole; what the table abbreviates is among them."""
    section = dict(sections(PAGES["functions.md"]))["The functions"]
    text = re.search(r"```text\n(.*?)```", section, re.DOTALL).group(1)
    listed = {}
    for line in re.sub(r"\n +", " ", text).splitlines():
        if match := re.fullmatch(r"(.*): as (\w+)", line):
            listed |= dict.fromkeys(match.group(1).split(", "), listed[match.group(2)])
            continue
        name = line.partition("(")[0]
        names = {}
        exec(f"def {line}: ...", names)
        listed[name] = names[name]
    for name, function in listed.items():
        assert parameters(function) == parameters(getattr(dorac.functional, name)), name
    spans = re.findall(r"`([^`\n]*\.\.\.[^`\n]*)`", section)
    abbreviated = {name for span in spans for name in re.findall(r"(\w+)\(", span)}
    assert len(abbreviated) > 8
    assert abbreviated <= set(listed)
