"""Kinds of batch norm: what is trained, what is folded, and what processes share."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from rcnn.backbones.norm import NormKind, SyncBatchNorm, conv_norm, norm_factory


@pytest.mark.parametrize(
    ("kind", "trains_numbers", "trains_statistics"),
    [("frozen", False, False), ("batch", True, True), ("sync", True, True), ("fixed_statistics", True, False)],
)
def test_what_is_trained(kind: NormKind, trains_numbers: bool, trains_statistics: bool) -> None:
    norm = norm_factory(kind, 1e-3)(4).train()
    before = norm.get_buffer("running_mean").clone()
    out = norm(torch.randn(2, 4, 3, 3) + 5)
    assert (not torch.equal(norm.get_buffer("running_mean"), before)) == trains_statistics
    assert any(parameter.requires_grad for parameter in norm.parameters()) == trains_numbers
    # Statistics 0 and 1 leave the mean where it was; those of the batch bring it to 0.
    assert (abs(out.mean().item()) < 1e-3) == trains_statistics


def test_epsilon() -> None:
    # (3 - 1) / sqrt(3 + 1) = 1
    norm = norm_factory("frozen", 1.0)(1)
    norm.load_state_dict(
        {
            "weight": torch.ones(1),
            "bias": torch.zeros(1),
            "running_mean": torch.ones(1),
            "running_var": torch.tensor([3.0]),
        }
    )
    assert norm(torch.full((1, 1, 1, 1), 3.0)).item() == 1


def frozen_pair() -> tuple[nn.Conv2d, FrozenBatchNorm2d]:
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(6)
    for name in ("weight", "bias", "running_mean", "running_var"):
        norm.get_buffer(name).copy_(torch.rand(6) + 0.5)
    return nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), norm


def test_folded_or_not_the_numbers_and_gradients_are_one() -> None:
    conv, norm = (module.double() for module in frozen_pair())
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64, requires_grad=True)
    folded = conv_norm(conv, norm, x)
    plain = norm(conv(x))
    torch.testing.assert_close(folded, plain, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(conv_norm(conv, norm, x), plain, rtol=0, atol=0)
    upstream = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(folded, (x, conv.weight), upstream),
        torch.autograd.grad(plain, (x, conv.weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_folding_keeps_to_autocast() -> None:
    conv, norm = frozen_pair()
    x = torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded = conv_norm(conv, norm, x)
        with torch.no_grad():
            plain = conv_norm(conv, norm, x)
    assert folded.dtype == torch.bfloat16
    # bfloat16 has 8 bits: a relative 2^-8 per rounding, of weights, inputs and result.
    torch.testing.assert_close(folded.float(), plain.float(), rtol=0.02, atol=0.05)


def test_in_one_process_sync_is_plain_batch_norm() -> None:
    plain = nn.BatchNorm2d(3)
    sync = SyncBatchNorm(3)
    x = torch.randn(2, 3, 4, 4)
    for _ in range(2):
        torch.testing.assert_close(sync(x), plain(x))
    torch.testing.assert_close(sync.state_dict(), plain.state_dict())
    assert isinstance(copy.deepcopy(sync), SyncBatchNorm)


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rcnn.backbones.norm import SyncBatchNorm

def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    norm = SyncBatchNorm(3).double()
    data = torch.load(f"{folder}/data.pt", weights_only=True)
    norm.load_state_dict(data["state"])
    # One process has one picture, the other two.
    x = (data["x"][:1] if rank == 0 else data["x"][1:]).clone().requires_grad_()
    upstream = data["upstream"][:1] if rank == 0 else data["upstream"][1:]
    y = norm(x)
    y.backward(upstream)
    evaluated = norm.eval()(x)
    result = {"y": y, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad, "evaluated": evaluated}
    result = {name: value.detach() for name, value in result.items()}
    torch.save({**result, "state": norm.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(run, args=(sys.argv[1],), nprocs=2)
"""


def test_two_processes_share_their_statistics(tmp_path: Path) -> None:
    """Against torch's batch norm on the pictures of both."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3).double()
    nn.init.uniform_(plain.weight, 0.5, 2)
    x = torch.randn(3, 3, 4, 5, dtype=torch.float64) * 3 + 1
    upstream = torch.randn_like(x)
    torch.save({"state": plain.state_dict(), "x": x, "upstream": upstream}, tmp_path / "data.pt")
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    subprocess.run([sys.executable, str(tmp_path / "run.py"), str(tmp_path)], check=True, timeout=120)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))

    x.requires_grad_()
    expected = plain(x)
    expected.backward(upstream)
    torch.testing.assert_close(torch.cat((first["y"], second["y"])), expected.detach())
    torch.testing.assert_close(torch.cat((first["x"], second["x"])), x.grad)
    # DDP adds up what each process has of these.
    torch.testing.assert_close(first["weight"] + second["weight"], plain.weight.grad)
    torch.testing.assert_close(first["bias"] + second["bias"], plain.bias.grad)
    torch.testing.assert_close(first["state"], plain.state_dict())
    torch.testing.assert_close(second["state"], plain.state_dict())
    torch.testing.assert_close(first["evaluated"], plain.eval()(x[:1]).detach())
