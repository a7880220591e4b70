"""What of PEFT is not public is read in dorac/stock_peft.py, and a name that has moved is told with where to look."""

import pytest

pytest.importorskip("peft")

import peft_names
from peft.tuners.lora.model import LoraModel

from dorac import stock_peft


def test_all_is_there():
    assert {module for modules in peft_names.WHERE.values() for module in modules} == peft_names.modules()
    assert peft_names.moved() == []


def test_a_name_that_moved(monkeypatch):
    monkeypatch.delattr(LoraModel, "_create_new_module")
    (sentence,) = peft_names.moved()
    assert "has no peft.tuners.lora.model.LoraModel._create_new_module; models with adapters: look in" in sentence
    with pytest.raises(ImportError):
        from dorac.stock_peft import create_new_module  # noqa: F401


def test_no_other_file_reads_one():
    taken, elsewhere = peft_names.read()
    assert elsewhere == {}
    asked = {name.partition(".")[0] for name in taken} - {"DISPATCHERS", "is_imported", "place"}
    by_text = {*stock_peft.DISPATCHERS, "dispatch_bnb_8bit", "dispatch_bnb_4bit"}  # getattr(stock_peft, name)
    by_place = {"dora_caching", "build_peft_weight_mapping"}
    assert asked | by_text | by_place == stock_peft.PLACES.keys()


@pytest.mark.parametrize(
    "line",
    [
        "from peft.tuners.lora import LoraLayer",
        "from peft.tuners import lora",
        "from peft import tuners",
        "import peft.tuners.lora as lora",
        "import peft\npeft.tuners.lora.LoraLayer",
        "import peft\npeft.LoraModel._replace_module",
        "from peft import LoraModel\nLoraModel._replace_module",
        "from dorac.stock_peft import LoraModel\ndef late():\n    return LoraModel._replace_module",
        "from dorac import stock_peft\nstock_peft.DoraLinearLayer.get_lora_weight.__wrapped__",
        "import sys\nsys.modules.get('peft.tuners.lora.bnb')",
        "import pkgutil\npkgutil.resolve_name('peft.tuners.lora:LoraLayer')",
    ],
    ids=str,
)
def test_another_file_that_reads_one(line, tmp_path):
    tmp_path.joinpath("other.py").write_text(f"{line}\n")
    assert peft_names.read(tmp_path)[1].keys() == {"other.py"}


@pytest.mark.parametrize(
    "line",
    [
        "from peft import LoraConfig\nLoraConfig.from_pretrained",
        "import peft\npeft.LoraModel.merge_adapter",
        "from dorac.stock_peft import LoraModel\nLoraModel.merge_adapter",
        "from dorac import stock_peft\nstock_peft._DoraConvNdLayer",
        "'''As ``peft.tuners.lora.dora``.'''",
    ],
    ids=str,
)
def test_a_file_that_reads_what_it_may(line, tmp_path):
    tmp_path.joinpath("other.py").write_text(f"{line}\n")
    assert peft_names.read(tmp_path)[1] == {}


def test_a_name_that_nobody_knows():
    with pytest.raises(AttributeError, match=r"^module 'dorac\.stock_peft' has no attribute 'other'$"):
        stock_peft.other  # noqa: B018
