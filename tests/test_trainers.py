"""transformers' Trainer, TRL, Lightning and accelerate over models that ``apply_dora`` has wrapped, as they come."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_trainers as tiny
import torch
from safetensors.torch import load_file

import dorac

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_base(tmp_path_factory.mktemp("base"))


TRAINING = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "all": {"gradient_accumulation_steps": 2, "bf16": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "all" else pytest.mark.full) for c in TRAINING])
@pytest.mark.parametrize("dropout", [0.1, pytest.param(0.0, marks=pytest.mark.full)])
def test_trainer(base, case, dropout, tmp_path):
    """PEFT's files in each checkpoint; resuming gives the same bits; the best model is there at the end."""
    out, options = tmp_path / "out", TRAINING[case]
    model = tiny.wrapped(base, lora_dropout=dropout)
    whole = tiny.trainer(model, out, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, **options)
    whole.train()
    config = tiny.adapter_files(out / "checkpoint-2")
    assert config["base_model_name_or_path"] == base
    assert config["task_type"] == "CAUSAL_LM"
    assert whole.state.best_model_checkpoint == str(out / "checkpoint-4")

    resumed = tiny.trainer(tiny.wrapped(base, seed=2, lora_dropout=dropout), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    tiny.assert_equal(tiny.trained(resumed.model), tiny.trained(model))
    assert tiny.losses(resumed) == tiny.losses(whole)

    dorac.load_adapter(loaded := tiny.load(base), out / "checkpoint-4")
    tiny.assert_equal(tiny.trained(loaded), tiny.trained(model))
    twin = peft.PeftModel.from_pretrained(tiny.load(base), out / "checkpoint-4")
    torch.testing.assert_close(tiny.logits(twin), tiny.logits(loaded))


def test_the_best_model_is_not_the_last(base, tmp_path):
    """The largest loss counts as the best, so that losses that fall have it first."""
    model = tiny.wrapped(base)
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = tiny.trainer(model, tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = load_file(best / "adapter_model.safetensors")
    key = "model.layers.0.mlp.up_proj.lora_magnitude_vector"
    assert best.name != "checkpoint-4"
    assert torch.equal(model.get_parameter(key), saved[f"base_model.model.{key}"])


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "plain" else pytest.mark.full) for c in TRAINING])
def test_losses_beside_stock_peft(base, case, tmp_path):
    model = tiny.wrapped(base)
    twin = tiny.stock_twin(model, base, tmp_path / "start")
    runs = []
    for name, net in (("dorac", model), ("peft", twin)):
        runs.append(trainer := tiny.trainer(net, tmp_path / name, save_strategy="no", **TRAINING[case]))
        trainer.train()
    print(f"{case}: dorac {tiny.losses(runs[0])}, stock PEFT {tiny.losses(runs[1])}")
    rounding = torch.finfo(torch.bfloat16).eps if "bf16" in TRAINING[case] else 64 * torch.finfo(torch.float32).eps
    tolerance = {"rtol": rounding, "atol": 0}
    torch.testing.assert_close(torch.tensor(tiny.losses(runs[0])), torch.tensor(tiny.losses(runs[1])), **tolerance)
    assert len(set(tiny.losses(runs[0]))) == 4


def torchrun(arguments, folder, **options):
    """``trained_by_torchrun.py`` in two processes over gloo; what each has at the end."""
    folder.mkdir()
    script = Path(__file__).parent / "trained_by_torchrun.py"
    root = Path(dorac.__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    paths = os.pathsep.join([str(root), str(script.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *map(str, arguments), str(folder), json.dumps(options)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def stock_losses(base, tmp_path_factory):
    """Of stock PEFT under DDP, from the start of :func:`tiny_trainers.wrapped`."""
    folder = tmp_path_factory.mktemp("stock")
    tiny.save_start(base, folder / "start")
    return torchrun([base, f"stock:{folder / 'start'}", "-"], folder / "run")[0]["losses"]


@pytest.mark.full
def test_two_processes(base, stock_losses, tmp_path):
    """DDP: both hold the same at the end, and so do two that resume; losses are stock PEFT's."""
    whole = torchrun([base, "dorac", "-"], tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-2"
    tiny.adapter_files(checkpoint)
    resumed = torchrun([base, "dorac", checkpoint], tmp_path / "resumed")
    for run in (whole[1], *resumed):
        tiny.assert_equal(whole[0]["trained"], run["trained"])
    assert resumed[0]["losses"] == whole[0]["losses"]
    print(f"two processes: dorac {whole[0]['losses']}, stock PEFT {stock_losses}")
    torch.testing.assert_close(torch.tensor(whole[0]["losses"]), torch.tensor(stock_losses))


FSDP2 = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
IN_PARTS = FSDP2 | {"fsdp_config": FSDP2["fsdp_config"] | {"state_dict_type": "SHARDED_STATE_DICT"}}
ZERO_3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_gather_16bit_weights_on_model_save": True,
}
DEEPSPEED = {
    "zero_optimization": ZERO_3,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}
SHARDED = {
    "FSDP2": ("dorac", FSDP2),
    "FSDP2, norms kept": ("dorac", FSDP2 | {"keep_norms": True}),
    "FSDP2, checkpoints in parts": ("dorac", IN_PARTS),
    "FSDP2, drop-in": ("dropin:{start}", FSDP2),
    "FSDP2, drop-in, norms kept": ("dropin:{start}", FSDP2 | {"keep_norms": True}),
    "DDP, norms kept": ("dorac", {"keep_norms": True}),
    "ZeRO-3, drop-in": ("dropin:{start}", {"deepspeed": DEEPSPEED}),
}


@pytest.mark.full
@pytest.mark.parametrize("case", SHARDED)
def test_two_processes_sharded(base, stock_losses, case, tmp_path):
    """Resumed, bit for bit; the losses are those of DDP over stock PEFT; adapters are kept."""
    kind, options = SHARDED[case]
    if "deepspeed" in options:
        pytest.importorskip("deepspeed")
    tiny.save_start(base, tmp_path / "start")
    kind = kind.format(start=tmp_path / "start")
    whole = torchrun([base, kind, "-"], tmp_path / "whole", **options)
    checkpoints = tmp_path / "whole" / "out"
    resumed = torchrun([base, kind, checkpoints / "checkpoint-2"], tmp_path / "resumed", **options)
    for run in (whole[1], *resumed):
        tiny.assert_equal(whole[0]["trained"], run["trained"])
    assert resumed[0]["losses"] == whole[0]["losses"]
    torch.testing.assert_close(torch.tensor(whole[0]["losses"]), torch.tensor(stock_losses))

    adapters = [] if "parts" in case else [checkpoints / "checkpoint-4"]
    if kind == "dorac":
        adapters.append(tmp_path / "whole" / "adapter")
    for directory in adapters:
        dorac.load_adapter(loaded := tiny.load(base), directory)
        own = (name.removeprefix("base_model.model.").replace(".default.weight", "") for name in whole[0]["trained"])
        tiny.assert_equal(tiny.trained(loaded), dict(zip(own, whole[0]["trained"].values(), strict=True)))


def steps(accelerator, model, optimizer, rows, count):
    for _ in range(count):
        for batch in torch.utils.data.DataLoader(rows, batch_size=4):
            loss = model(**batch).loss
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    return loss.item()


@pytest.mark.parametrize("hook", [False, True])
def test_accelerate_saves_and_loads_its_state(base, hook, tmp_path):
    import accelerate

    runs = []
    for seed in (1, 2):
        model = tiny.wrapped(base, seed=seed)
        accelerator = accelerate.Accelerator(cpu=True)
        net, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        if hook:  # that of dorac/docs/trainers.md
            accelerator.register_save_state_pre_hook(lambda models, _, folder: dorac.save_adapter(models[0], folder))
        if not runs:
            steps(accelerator, net, optimizer, tiny.Rows(), 1)
            accelerator.save_state(str(tmp_path / "state"))
        else:
            accelerator.load_state(str(tmp_path / "state"))
        loss = steps(accelerator, net, optimizer, tiny.Rows(), 1)
        runs.append((tiny.trained(model), loss))
        accelerator.free_memory()
    tiny.assert_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    if hook:
        dorac.load_adapter(tiny.load(base), tmp_path / "state")


def test_accelerates_recipe_for_save_pretrained(base, tmp_path):
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(tiny.wrapped(base))
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    dorac.load_adapter(loaded := tiny.load(base), tmp_path)
    tiny.assert_equal(tiny.trained(loaded), tiny.trained(model))


@pytest.mark.parametrize("adapters_only", [False, True])
def test_lightning(base, adapters_only, tmp_path):
    """ModelCheckpoint and ``ckpt_path`` over whole checkpoints, and over those that hold what is trained alone."""
    lightning = pytest.importorskip("lightning")

    class Tuned(lightning.LightningModule):
        strict_loading = not adapters_only

        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            loss = self.model(**batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

        def on_save_checkpoint(self, checkpoint):
            if adapters_only:
                trained = {name for name, p in self.named_parameters() if p.requires_grad}
                checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
                dorac.save_adapter(self.model, tmp_path / f"adapter-{self.global_step}")

    def run(seed, steps, ckpt_path=None):
        saver = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(accelerator="cpu", max_steps=steps, callbacks=[saver], **quiet)
        module = Tuned(tiny.wrapped(base, seed=seed))
        trainer.fit(module, torch.utils.data.DataLoader(tiny.Rows(), batch_size=4), ckpt_path=ckpt_path)
        return module.model

    whole = run(1, 8)
    resumed = run(2, 8, ckpt_path=str(tmp_path / "step=4.ckpt"))
    tiny.assert_equal(tiny.trained(resumed), tiny.trained(whole))
    if adapters_only:
        dorac.load_adapter(loaded := tiny.load(base), tmp_path / "adapter-8")
        tiny.assert_equal(tiny.trained(loaded), tiny.trained(whole))


TRL = {
    "sft": {},
    "sft accumulated": {"gradient_accumulation_steps": 2, "bf16": True},
    "dpo": {},
    "dpo precomputed": {"precompute_ref_log_probs": True},
}


def trl_trainer(case, model, out, **options):
    import datasets
    import trl

    options = tiny.OPTIONS | {"bf16": False} | TRL[case] | options
    kind = case.split()[0]
    data = datasets.Dataset.from_dict(tiny.TEXTS if kind == "sft" else tiny.PAIRS)
    config, trainer = (trl.SFTConfig, trl.SFTTrainer) if kind == "sft" else (trl.DPOConfig, trl.DPOTrainer)
    return trainer(model=model, args=config(output_dir=str(out), **options), train_dataset=data)


@pytest.mark.parametrize("case", TRL)
def test_trl(base, case, tmp_path):
    """Losses beside stock PEFT's over the same adapter.

    In DPO the reference of an adapted model is its base model from the disk, or is computed before the first step; of
    stock PEFT's it is a copy of the adapter as it starts. Both are one at a zero delta.
    """
    for name in ("trl", "datasets"):
        pytest.importorskip(name)
    model = tiny.wrapped(base)
    if "dpo" in case:
        tiny.to_start(model)
    twin = tiny.stock_twin(model, base, tmp_path / "start")
    whole, stock = trl_trainer(case, model, tmp_path / "out"), trl_trainer(case, twin, tmp_path / "stock")
    whole.train()
    stock.train()
    print(f"{case}: dorac {tiny.losses(whole)}, stock PEFT {tiny.losses(stock)}")
    rounding = torch.finfo(torch.bfloat16).eps if TRL[case].get("bf16") else 64 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        torch.tensor(tiny.losses(whole)), torch.tensor(tiny.losses(stock)), rtol=rounding, atol=0
    )
    assert len(set(tiny.losses(whole))) == 4
    tiny.adapter_files(tmp_path / "out" / "checkpoint-4")

    again = tiny.wrapped(base, seed=2)
    if "dpo" in case:
        tiny.to_start(again)
    resumed = trl_trainer(case, again, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    tiny.assert_equal(tiny.trained(resumed.model), tiny.trained(model))


@pytest.mark.full
def test_trainer_over_nf4(tmp_path):
    """Quantised layers: Trainer takes the model, resumes and ends where the drop-in's would."""
    pytest.importorskip("bitsandbytes")
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    loading = {"quantization_config": quantised, "dtype": torch.bfloat16, "device_map": "cpu"}
    base = tiny.save_base(tmp_path / "base", torch.bfloat16, hidden_size=64, intermediate_size=128)
    model = tiny.wrapped(base, loading=loading)
    whole = tiny.trainer(model, tmp_path / "out", bf16=True)
    whole.train()
    tiny.adapter_files(tmp_path / "out" / "checkpoint-2")
    resumed = tiny.trainer(tiny.wrapped(base, seed=2, loading=loading), tmp_path / "resumed", bf16=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    tiny.assert_equal(tiny.trained(resumed.model), tiny.trained(model))
