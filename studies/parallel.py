"""One sequence over several GPUs of a host: training steps of stacks of Mamba layers by `projecta.parallel`.

`python -m studies.parallel [FOLDER] [--models 130m,2.8b] [--worlds 1,2,4]` runs world sizes 1, 2, 4, ... up
to the GPUs there are, over NCCL, and writes parallel.csv: a row for each model, length, world size and
schedule. A step is forward, backward, averaging of gradients and AdamW, in bfloat16. "speedup" and "memory"
compare with one GPU on the same sequence, "rate" with one GPU's tokens a second on a sequence as long as a
rank's piece, or on the longest that it trains. Before it is timed, a small stack is compared with one GPU in
float32, and FSDP2 over a mesh of 2 x 2 in bfloat16.
"""

import argparse
import copy
import csv
import datetime
import gc
import json
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from projecta import MambaBlock, parallel
from projecta.regress.store.provenance import record_provenance

# d_model, layers, whether layers are computed again in the backward pass
MODELS = {"130m": (768, 24, False), "2.8b": (2560, 64, True)}
LENGTHS = {"130m": (131_072, 262_144, 524_288, 1_048_576), "2.8b": (131_072, 262_144, 1_048_576)}
PIECES = (32_768, 65_536)  # also measured on one GPU, to compare pieces with
LONGEST_PIECE = 262_144  # that the memory of one GPU holds
STACKS = (1, 2, 4, 8)  # layers, for the choice of the schedule
Row = dict[str, Any]


class Stack(nn.Module):
    """Mamba layers with norms and residuals, as in a language model, without its embedding and its head."""

    def __init__(self, width: int, layers: int, again: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(layers))
        self.blocks = nn.ModuleList(MambaBlock(width) for _ in range(layers))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):

            def layer(x: Tensor, norm: nn.Module = norm, block: nn.Module = block) -> Tensor:
                return x + block(norm(x))

            if self.again:
                x = checkpoint(layer, x, use_reentrant=False, context_fn=parallel.checkpoint_contexts)
            else:
                x = layer(x)
        return x


def train_step(model: nn.Module, optimiser: Any, x: Tensor, where: parallel.Context | None) -> Tensor:
    if where is None:
        loss = model(x).float().square().mean()
        loss.backward()
    else:
        y = model(x)
        loss = parallel.mean_loss(y.float().square().sum(), y.numel(), where.group)
        loss.backward()
        parallel.average_gradients(model.parameters(), where.group)
    optimiser.step()
    optimiser.zero_grad()
    return loss.detach()


def timed_steps(model: nn.Module, x: Tensor, schedule: str | None, steps: int) -> Row:
    """Median time of a step in milliseconds, and the largest peak of memory of a rank."""
    optimiser = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    times = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 1):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        if schedule is None:
            train_step(model, optimiser, x, None)
        else:
            with parallel.context(schedule=schedule) as where:
                train_step(model, optimiser, x, where)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    found = torch.tensor([statistics.median(times[1:]), torch.cuda.max_memory_allocated() / 2**20]).cuda()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return {"step_ms": round(found[0].item(), 2), "peak_mib": round(found[1].item())}


def message_ms(width: int, repeats: int = 200) -> float:
    """Milliseconds for which a rank's queue is busy with receiving one layer's state and handing it on."""
    kept, state = (1, 2 * width, 3), (1, 2 * width, 16)
    sent = torch.zeros(kept, device="cuda"), torch.zeros(state, device="cuda")
    output = torch.zeros(1, device="cuda")
    with torch.no_grad(), parallel.context() as where:
        for timed in (False, True):
            dist.barrier()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats if timed else 20):
                found = parallel.received(where, output.device, kept, state)
                parallel.hand_on(where, output, *(found or sent))
            torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / repeats


def piece_of(model: str, length: int) -> Tensor:
    first, last = parallel.bounds(length)
    torch.manual_seed(dist.get_rank())
    return torch.randn(1, last - first, MODELS[model][0], device="cuda", dtype=torch.bfloat16)


def build(width: int, layers: int, again: bool = False, dtype: torch.dtype = torch.bfloat16) -> Stack:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Stack(width, layers, again).to(dtype)
    for block in model.blocks:
        block.A_log.data, block.D.data = block.A_log.data.float(), block.D.data.float()
    return model


def compare_with_one(schedule: str) -> float:
    """The largest error of outputs and gradients in float32, relative to each tensor's largest number."""
    model = build(256, 3, True, torch.float32)
    whole = copy.deepcopy(model)
    torch.manual_seed(3)
    x = torch.randn(2, 5000, 256, device="cuda")
    wanted = whole(x)
    wanted.square().sum().backward()
    first, last = parallel.bounds(5000)
    with parallel.context(schedule=schedule):
        y = model(x[:, first:last])
    y.square().sum().backward()
    parallel.average_gradients(model.parameters())
    size, both = dist.get_world_size(), zip(model.parameters(), whole.parameters(), strict=True)
    pairs = [(size * p.grad, q.grad) for p, q in both]
    pairs.append((y, wanted[:, first:last]))
    worst = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def compare_mesh(steps: int = 4) -> list[tuple[float, float]]:
    """Losses of FSDP2 over a mesh of 2 x 2 and of one GPU, in bfloat16 by autocast."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cuda", (2, 2), mesh_dim_names=("pieces", "batches"))
    torch.manual_seed(3)
    x = torch.randn(2, 16_384, 768, device="cuda")
    model = build(768, 24, dtype=torch.float32)
    whole = copy.deepcopy(model)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimisers = [torch.optim.AdamW(m.parameters(), 1e-4, fused=True) for m in (model, whole)]
    first, last = parallel.bounds(x.shape[1], mesh["pieces"])
    mine = x[mesh["batches"].get_local_rank()][None, first:last]
    losses = []
    for _ in range(steps):
        with parallel.context(mesh["pieces"]), torch.autocast("cuda", torch.bfloat16):
            y = model(mine)
            total = y.float().square().sum()
            parallel.mean_loss(total, y.numel()).backward()
        with torch.autocast("cuda", torch.bfloat16):
            one = whole(x).float().square().mean()
        one.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        total = total.detach()
        dist.all_reduce(total)
        losses.append((total.item() / x.numel(), one.item()))
    return losses


def rows_of_world(models: list[str], size: int) -> list[Row]:
    """All rows of one world size; on every rank."""
    rows: list[Row] = []

    def measure(model: str, width: int, layers: int, again: bool, length: int, schedule: str | None) -> None:
        net = build(width, layers, again)
        row: Row = {"model": model, "layers": layers, "d_model": width, "tokens": length, "ranks": size}
        row["gradients_gb"] = round(sum(p.numel() * p.element_size() for p in net.parameters()) / 1e9, 3)
        try:
            found = timed_steps(net, piece_of(model, length), schedule, 2 if again else 4)
        except torch.OutOfMemoryError:
            found = {"step_ms": "", "peak_mib": "out of memory"}
        rows.append(row | {"schedule": schedule or ""} | found)
        gc.collect()
        torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            print(rows[-1], flush=True)

    schedules = (None,) if size == 1 else parallel.SCHEDULES
    for model in models:
        width, layers, again = MODELS[model]
        link = message_ms(width) if size > 1 else 0
        for length in (*(PIECES if size == 1 else ()), *LENGTHS[model]):
            too_long = length > LONGEST_PIECE * size
            if too_long and (size > 1 or length > 2 * LONGEST_PIECE):
                continue
            for schedule in schedules:
                if schedule != "gather" or (length == LENGTHS[model][0] and not again):
                    measure(model, width, layers, again, length, schedule)
        for row in rows:
            if row["model"] == model:
                row["message_ms"] = round(link, 4)
        for count in STACKS if not again else ():
            for schedule in schedules:
                measure(model, width, count, False, 131_072, schedule)
    return rows


def work(rank: int, size: int, port: int, models: list[str], into: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=120))
    checks: Row = {}
    if size > 1:
        checks = {f"error, {schedule}": compare_with_one(schedule) for schedule in parallel.SCHEDULES}
    if size == 4:
        checks["losses, mesh and one GPU"] = compare_mesh()
    if rank == 0:
        print(size, checks, flush=True)
    rows = rows_of_world(models, size)
    if rank == 0:
        Path(into).write_text(json.dumps({"checks": checks, "rows": rows}))
    dist.barrier()
    dist.destroy_process_group()


def compare_rows(rows: list[Row]) -> None:
    """Add speedup, prediction, rate and memory of each row over one GPU's."""
    alone = {
        (row["model"], row["layers"], row["tokens"]): row
        for row in rows
        if row["ranks"] == 1 and row["step_ms"]
    }
    for row in rows:
        if row["step_ms"] == "":
            continue
        same = alone.get((row["model"], row["layers"], row["tokens"]))
        if same is not None:
            row["speedup"] = round(same["step_ms"] / row["step_ms"], 3)
            row["memory"] = round(row["peak_mib"] / same["peak_mib"], 3)
        # one GPU on a sequence as long as the piece of a rank, or the nearest shorter one
        lengths = [key[2] for key in alone if key[:2] == (row["model"], row["layers"])]
        near = [length for length in lengths if length <= row["tokens"] / row["ranks"]]
        base = alone[row["model"], row["layers"], max(near) if near else min(lengths)]
        one, own = base["tokens"] / base["step_ms"], row["tokens"] / row["ranks"] / row["step_ms"]
        row["rate"] = round(own / one, 3)


COLUMNS = (
    "model", "layers", "d_model", "tokens", "ranks", "schedule", "step_ms", "peak_mib", "gradients_gb",
    "message_ms", "speedup", "memory", "rate",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--worlds", default="1,2,4,8")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for size in map(int, arguments.worlds.split(",")):
        if size > torch.cuda.device_count():
            continue
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        found = arguments.folder / f"world{size}.json"
        mp.spawn(work, (size, port, arguments.models.split(","), str(found)), size)
        rows += json.loads(found.read_text())["rows"]
    compare_rows(rows)
    path = arguments.folder / "parallel.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    record_provenance([path], "python -m studies.parallel")
    for row in rows:
        print(*(str(row.get(name, "")).rjust(max(8, len(name))) for name in COLUMNS))


if __name__ == "__main__":
    main()
