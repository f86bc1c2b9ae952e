"""Train a byte model on a sequence that is cut over all ranks.

`torchrun --nproc-per-node 2 examples/long_context.py --length 4096 --steps 3` runs on CPUs or GPUs.
The text is that of Python's own library, 262,144 bytes by default. Every rank prints the same loss.
"""

import argparse
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from projecta import MambaBlock, parallel


class ByteModel(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(layers + 1))
        self.blocks = nn.ModuleList(MambaBlock(width) for _ in range(layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for norm, block in zip(self.norms, self.blocks, strict=False):
            x = x + block(norm(x))
        return self.norms[-1](x) @ self.embed.weight.t()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=262_144)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--schedule", choices=parallel.SCHEDULES, default="pass")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same weights on every rank
    model = ByteModel(arguments.width, arguments.layers).to(device)
    text = b"".join(p.read_bytes() for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    ids = torch.frombuffer(bytearray(text[: arguments.length + 1]), dtype=torch.uint8).long()[None].to(device)
    inputs, answers = parallel.split(ids[:, :-1]), parallel.split(ids[:, 1:])
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(arguments.steps):
        start = time.perf_counter()
        with parallel.context(schedule=arguments.schedule):
            logits = model(inputs)
            total = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="sum")
            loss = parallel.mean_loss(total, answers.numel())
            loss.backward()
        parallel.average_gradients(model.parameters())
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        seconds = time.perf_counter() - start
        print(
            f"rank {rank}, step {step}: loss {mean.item() / dist.get_world_size():.4f}, {seconds:.2f} s",
            flush=True,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
