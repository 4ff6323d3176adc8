"""One training by several processes: which of them this is, and what they add up.

The rules, so that more processes mean the same training, only faster. A recipe's batch size is of the *whole* batch;
every process takes its share of each batch, the same images that one process would see, cropped and flipped alike, so
learning rates stay as they are. Gradients are averaged (torch's DistributedDataParallel). BatchNorm on GPUs takes its
statistics over the whole batch (SyncBatchNorm); on processors, where torch has none, each process's own share, and
the running statistics are those of the first process. Dropout and attacks' starting points are drawn by each process
for itself, and a teacher's hints are measured in the variance of its own share. The first process alone writes and
speaks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class World:
    """The processes of a training.

    Attributes:
        rank: the number of this one, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int] | None:
        """What `batches` wants to know: this one's part of every batch; None where it is all of it."""
        return (self.rank, self.size) if self.size > 1 else None

    def totals(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return list(values)
        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        summed = torch.tensor(values, dtype=torch.float64, device=where)
        dist.all_reduce(summed)
        return summed.tolist()

    def gathered(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of every process, by rank; all of one size."""
        if self.size == 1:
            return [mine]
        own = mine.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return [part.cpu() for part in parts]

    def agreed(self, mine: bool) -> bool:
        """What the first process says, so that all do the same."""
        if self.size == 1:
            return mine
        said = torch.tensor([float(mine)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(said, 0)
        return bool(said.item())

    def wrapped(self, net: nn.Module, where: torch.device) -> nn.Module:
        """A network whose gradients are averaged over all processes; the same object where there is one."""
        if self.size == 1:
            return net
        if where.type == "cuda":
            from timm.layers import convert_sync_batchnorm  # torch's own drops the activation of a BatchNormAct2d

            if convert_sync_batchnorm(net) is not net:
                raise ValueError("a network that is a BatchNorm itself can't be trained by several processes")
        return nn.parallel.DistributedDataParallel(net, device_ids=[where] if where.type == "cuda" else None)

    def refuse_batch(self, batch_size: int, images: int) -> None:
        """
        Raises:
            ValueError: a batch that can't be shared evenly: means of means would be no means.
        """
        if min(batch_size, images) % self.size:
            raise ValueError(
                f"a batch of {min(batch_size, images)} images can't be shared evenly by {self.size} processes"
            )


def world() -> World:
    """The processes that this one belongs to: torchrun's, once they have met, or itself alone."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()
