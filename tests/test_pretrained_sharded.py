"""``save_pretrained`` of a model in FSDP2: called by every process, or by one with what a trainer has gathered."""

import processes
import pytest
import torch
from safetensors.torch import load_file

import dorac

pytest.importorskip("huggingface_hub")

import hub_model


def save(folder):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = hub_model.adapted()
    fully_shard(model.up)
    fully_shard(model)
    rank = torch.distributed.get_rank()
    model.save_pretrained(f"{folder}/checkpoint-1", is_main_process=rank == 0)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # as Trainer: the others are not asked
        model.save_pretrained(f"{folder}/checkpoint-2", state_dict=state, is_main_process=True)
        with pytest.raises(ValueError, match=r"holds up.lora_A in parts \(a DTensor\): gather it with full_state_dict"):
            model.save_pretrained(f"{folder}/checkpoint-3", state_dict=model.state_dict(), is_main_process=True)
    torch.distributed.barrier()


def test_sharded(tmp_path):
    processes.run(save, tmp_path, "cpu", str(tmp_path))
    assert not (tmp_path / "checkpoint-3").exists()
    model = hub_model.adapted()
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for number in (1, 2):
        directory = tmp_path / f"checkpoint-{number}"
        assert '"base_model_class": "HubModel"' in (directory / "adapter_config.json").read_text()
        again = hub_model.HubModel()
        dorac.load_adapter(again, directory)
        state = load_file(directory / "model.safetensors")
        for name, parameter in adapter.items():
            assert torch.equal(again.get_parameter(name), parameter)
            assert torch.equal(state[name], parameter)
