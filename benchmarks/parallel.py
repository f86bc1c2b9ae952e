"""One sequence over several ranks: a training step of a stack of blocks, by `projecta.parallel`.

Each rank is a process: over gloo on a CPU, over NCCL with a GPU each.
"""

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import common

WIDTH, LAYERS, LENGTH = 128, 4, 2048
TOLERANCE = 1e-5
VERSION = common.version(__file__)


def _stack(device: torch.device, backend: str = "auto") -> torch.nn.Module:
    from projecta import MambaBlock

    torch.manual_seed(0)
    return torch.nn.Sequential(*(MambaBlock(WIDTH, backend=backend) for _ in range(LAYERS))).to(device)


def _sequence(device: torch.device) -> torch.Tensor:
    return torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)


def _step(model: torch.nn.Module, x: torch.Tensor, schedule: str) -> torch.Tensor:
    """The loss's gradient by every weight, as one vector: the same on every rank."""
    from projecta import parallel

    model.zero_grad()
    with parallel.context(schedule=schedule):
        y = model(x)
        parallel.mean_loss(y.square().sum(), LENGTH * WIDTH // parallel.current().size).backward()
    parallel.average_gradients(model.parameters())
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    """A rank: a step for each schedule that comes, until None comes."""
    import torch.distributed as dist

    from projecta import parallel

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl" if gpu else "gloo", init_method=address, rank=rank, world_size=size)
    model, x = _stack(device), parallel.split(_sequence(device))
    for schedule in iter(pipe.recv, None):
        gradient = _step(model, x, schedule)
        pipe.send(gradient.cpu().numpy() if rank == 0 else bool(gradient.sum().isfinite()))
    dist.destroy_process_group()


class Ranks:
    """Running ranks that take a step when asked."""

    def __init__(self, size: int):
        from torch import multiprocessing

        spawn = multiprocessing.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self._pipes, self._processes = [], []
        with _importable():
            for rank in range(size):
                here, there = spawn.Pipe()
                process = spawn.Process(target=_serve, args=(rank, size, port, there), daemon=True)
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)

    def step(self, schedule: str) -> Any:
        """The gradient by every weight."""
        for pipe in self._pipes:
            pipe.send(schedule)
        found = [pipe.recv() for pipe in self._pipes]
        return found[0]

    def stop(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(10)
            process.kill()


@contextlib.contextmanager
def _importable():
    """New processes find this module as asv's importer does, and do not run this one's main module."""
    main, folder = sys.modules["__main__"], str(Path(__file__).parents[1])
    hidden = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        vars(main).update(hidden)


class FullStep(common.Suite):
    """Four blocks of width 128, one sequence of 2,048 steps, float32."""

    params = ((1, 2, 4), ("pass", "gather"))
    param_names = ("ranks", "schedule")
    version = VERSION
    timeout = 300.0

    def setup(self, ranks, schedule):
        common.require_full()
        common.require("projecta", "parallel")
        gpu = common.device().type == "cuda"
        if ranks > (torch.cuda.device_count() if gpu else 2):
            common.skip(f"{ranks} ranks need as many GPUs, or on a CPU 2 at most")
        self.ranks = Ranks(ranks)
        got = torch.from_numpy(self.ranks.step(schedule))
        cpu = torch.device("cpu")
        model, x = _stack(cpu, "vectorised").double(), _sequence(cpu).double()
        model(x).square().mean().backward()
        truth = torch.cat([p.grad.flatten() for p in model.parameters()])
        common.check_close("gradient", got, truth, TOLERANCE)

    def time_step(self, ranks, schedule):
        self.ranks.step(schedule)

    def teardown(self, ranks, schedule):
        if hasattr(self, "ranks"):
            self.ranks.stop()
