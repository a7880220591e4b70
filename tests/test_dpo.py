"""TRL's DPO on adapters of dorac's: the reference model is the base model, over the same parameters."""

import copy

import pytest
import torch

pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

import dorac  # noqa: E402
import dorac.peft  # noqa: E402

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _stock_afterwards():
    yield
    dorac.peft.disable()


def tokenizer():
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def language_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=len(WORDS), pad_token_id=0))


def losses(model, path, **options):
    rows = {"prompt": ["a b c", "d e f"] * 4, "chosen": [" g h", " i j"] * 4, "rejected": [" k l", " m n"] * 4}
    args = DPOConfig(
        output_dir=str(path),
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        model, args=args, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer(), **options
    )
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], trainer


def start(seed=1):
    """An adapted model of dorac.nn, and the same one of PEFT's under the drop-in, off their start."""
    model = language_model()
    dorac.apply_dora(model, TARGETS, r=2, lora_alpha=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_reference_models_agree(tmp_path):
    model = start()
    dorac.save_adapter(model, tmp_path / "adapter")
    base = language_model()
    own, _ = losses(copy.deepcopy(model), tmp_path, ref_model=copy.deepcopy(base))  # two models, as without dorac
    reference = dorac.base_model(model)
    shared, trainer = losses(model, tmp_path, ref_model=reference)
    assert shared == own
    assert len({round(loss, 6) for loss in own}) == 3
    trained = {id(p) for p in trainer.model.parameters()}
    assert all(id(p) in trained for p in reference.parameters())

    through_peft = peft.PeftModel.from_pretrained(language_model(), tmp_path / "adapter", is_trainable=True)
    dorac.peft.enable(through_peft)
    kept = {n: p.detach().clone() for n, p in through_peft.named_parameters() if "lora_" not in n}
    dropin, _ = losses(through_peft, tmp_path)
    assert len(dropin) == 3
    assert all(torch.equal(p, kept[n]) for n, p in through_peft.named_parameters() if n in kept)
