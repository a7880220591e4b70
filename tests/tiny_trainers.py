"""A tiny causal language model on disk with its tokenizer, and one adapter over it for dorac and for stock PEFT."""

import functools
import json
from pathlib import Path

import torch
from torch.utils.data import Dataset

import dorac

WORDS = ["<unk>", "</s>", "a", "row", "has", "one", "length", "norm", "of", "its", "own"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def save_base(directory, dtype=torch.float32, **sizes) -> str:
    """Writes a random Llama and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **SIZES | sizes)).to(dtype).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


def load(base, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, **options)


def wrapped(base, seed=1, **options):
    """The model over dorac.nn, its adapters off their start."""
    model = load(base, **options.pop("loading", {}))
    torch.manual_seed(seed)
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": False} | options
    dorac.apply_dora(model, "all-linear", **options)
    off_start(model)
    return model


@torch.no_grad()
def off_start(model):
    for layer in model.modules():
        if isinstance(layer, dorac.nn.DoraLayer):
            layer.lora_magnitude_vector.mul_(0.8 + 0.4 * torch.rand_like(layer.lora_magnitude_vector))


def save_start(base, directory):
    """The adapter that :func:`wrapped` starts from."""
    dorac.save_adapter(wrapped(base), directory)


@torch.no_grad()
def to_start(model):
    """A zero delta and g = 1."""
    for layer in model.modules():
        if isinstance(layer, dorac.nn.DoraLayer):
            layer.lora_B.zero_()
            layer.lora_magnitude_vector.copy_(layer.base_layer.weight.norm(dim=1))


def stock_twin(model, base, directory):
    """Stock PEFT's model with the adapter of ``model``, to be trained."""
    import peft

    dorac.save_adapter(model, directory)
    return peft.PeftModel.from_pretrained(load(base), directory, is_trainable=True)


def shard_on_cpus():
    """accelerate shards on GPUs alone: what it would note of one, of processes over gloo."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    stock = AcceleratorState.__init__

    def noting(self, *args, fsdp_plugin=None, **options):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if "fsdp_plugin" in self._shared_state:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = noting


class Rows(Dataset):
    """Sixteen rows of nine tokens."""

    def __init__(self):
        self.ids = torch.randint(2, len(WORDS), (16, 9), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


TEXTS = {"text": ["a row has one length", "a row has its own norm", "one norm of a row"] * 6}
PAIRS = {
    "prompt": ["a row has", "one norm of"] * 8,
    "chosen": [" one length", " a row"] * 8,
    "rejected": [" its own", " its length"] * 8,
}

OPTIONS = {
    "max_steps": 4,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "logging_steps": 1,
    "disable_tqdm": True,
}


def trainer(model, out, **options):
    import transformers

    args = transformers.TrainingArguments(output_dir=str(out), **OPTIONS | options)
    return transformers.Trainer(model=model, args=args, train_dataset=Rows(), eval_dataset=Rows())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(one, other):
    """The same tensors under the same names, bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@functools.cache
def ids():
    return Rows().ids[:2]


@torch.no_grad()
def logits(model):
    return model.eval()(ids()).logits


def adapter_files(directory):
    """PEFT's two, of which the config names the base model."""
    files = {path.name for path in Path(directory).iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert "config.json" not in files
    return json.loads(Path(directory, "adapter_config.json").read_text())
