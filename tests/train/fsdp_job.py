"""Run by torchrun on two processes: a sharded model has the loss of a whole one, and saves the same adapter."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))  # torch.distributed.run starts it by its path

from icarus import adapter
from icarus.streams import IGNORED, Batch, TwoStreams
from tiny_models import tiny


def adapted() -> torch.nn.Module:
    torch.manual_seed(0)
    model = adapter.attach(tiny("llama"), rank=4).train()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    whole, sharded = adapted(), adapted()
    fingerprint = adapter.fingerprint(sharded)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ids = torch.arange(24).reshape(2, 12) + 3
    batch = Batch.of(ids, torch.where(torch.arange(12) < 8, IGNORED, ids))
    losses = [TwoStreams(model).loss(batch)[0] for model in (whole, sharded)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    for one, other in ((a.grad, b.grad) for a, b in pairs if a.requires_grad):
        torch.testing.assert_close(one, other.full_tensor())
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        adapter.save(whole, folder / "whole")
        adapter.save(sharded, folder / "sharded", base_fingerprint=fingerprint, state_dict=state)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
