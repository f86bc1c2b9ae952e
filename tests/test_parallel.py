"""Context parallelism over gloo: outputs and gradients of one process, faults that end in one line."""

import copy
import datetime
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from projecta import MambaBlock, accelerate, parallel

LENGTH = 23


def _port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _work(rank, size, port, job, options, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=options.get("timeout", 60))
    )
    try:
        results.put((rank, job(rank, size, **{k: v for k, v in options.items() if k != "timeout"})))
    except Exception as error:
        results.put(
            (rank, f"{type(error).__name__}: {error}" if options.get("timeout") else traceback.format_exc())
        )


def launch(job, size, **options):
    """What `job(rank, size)` returns on each rank; the text of an error as a string."""
    spawn = mp.get_context("spawn")
    results, port = spawn.Queue(), _port()
    processes = [
        spawn.Process(target=_work, args=(r, size, port, job, options, results)) for r in range(size)
    ]
    for process in processes:
        process.start()
    expected = size - len(options.get("dead", ()))
    found = dict(results.get(timeout=120) for _ in range(expected))
    for process in processes:
        process.join(30)
        process.kill()
    return found


def _model(kind):
    torch.manual_seed(0)
    if kind == "blocks":
        return torch.nn.Sequential(*(MambaBlock(8, d_state=4) for _ in range(3)))
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, state_size=4))


def _pieces(size):
    """Uneven: the first rank holds four tokens more than the others, the last the rest."""
    each = LENGTH // size - 2
    ends = [each + 4 + i * each for i in range(size - 1)]
    return list(zip([0, *ends], [*ends, LENGTH], strict=True))


def _compare(rank, size, kind, schedule):
    """The largest errors of output and gradients against one process with the whole sequence."""
    model = _model(kind)
    whole = copy.deepcopy(model)
    torch.manual_seed(1)
    first, last = _pieces(size)[rank]
    if kind == "blocks":
        x, weight = torch.randn(2, LENGTH, 8), torch.randn(2, LENGTH, 8)
        run = lambda m, at: m(at)  # noqa: E731
        wanted = whole(x)
    else:
        x, weight = torch.randint(0, 20, (2, LENGTH)), torch.randn(2, LENGTH, 20)
        run = lambda m, at: m(at, use_cache=False).logits  # noqa: E731
        accelerate(model), accelerate(whole)
        wanted = run(whole, x)
    (wanted * weight).sum().backward()
    with parallel.context(schedule=schedule):
        y = run(model, x[:, first:last])
        (y * weight[:, first:last]).sum().backward()
    parallel.average_gradients(model.parameters())
    errors = [float((y - wanted[:, first:last]).abs().max())]
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert p.grad is not None, name
        errors.append(float((size * p.grad - q.grad).abs().max() / q.grad.abs().max().clamp_min(1e-6)))
    with torch.no_grad(), parallel.context(schedule=schedule):
        again = run(model, x[:, first:last])
    errors.append(float((again - y).abs().max()))
    return max(errors)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("schedule", parallel.SCHEDULES)
@pytest.mark.parametrize("kind", ["blocks", "transformers"])
def test_outputs_and_gradients_are_those_of_one_process(kind, schedule, size):
    if kind == "transformers":
        pytest.importorskip("transformers")
    for rank, error in launch(_compare, size, kind=kind, schedule=schedule).items():
        assert isinstance(error, float), error
        assert error < 1e-4, (rank, error)


def _helpers(rank, size):
    whole = torch.arange(2 * LENGTH).view(2, LENGTH)
    mine = parallel.split(whole)
    assert torch.equal(parallel.join(mine), whole)
    uneven = whole[:, : 3 + rank].float()
    assert parallel.join(uneven).shape == (2, sum(3 + r for r in range(size)))
    p = torch.nn.Parameter(torch.ones(3))
    losses = torch.arange(float(LENGTH)).tensor_split(size)[rank]
    parallel.mean_loss((losses * p[0]).sum(), len(losses)).backward()
    parallel.average_gradients([p])
    return float(p.grad[0])


def test_helpers():
    mean = float(torch.arange(float(LENGTH)).mean())
    for value in launch(_helpers, 3).values():
        assert value == pytest.approx(mean), value


def _differ(rank, size, what):
    block = MambaBlock(8, d_state=4).to(torch.bfloat16 if (what == "dtype" and rank == 1) else torch.float32)
    length = 2 if what == "length" and rank == 1 else 9
    batch = 3 if what == "batch" and rank == 1 else 2
    x = torch.randn(batch, length, 8, dtype=block.in_proj.weight.dtype)
    with parallel.context():
        block(x)
    return ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "dtype",
            "parallel: all ranks must have the same dtype; rank 0 has torch.float32, rank 1 torch.bfloat16.",
        ),
        (
            "batch",
            "parallel: all ranks must have the same batch and width; rank 0 has (2, 8), rank 1 (3, 8).",
        ),
        ("length", "parallel: each rank needs at least d_conv - 1 = 3 tokens; rank 1 has 2."),
    ],
)
def test_ranks_that_differ_say_so_on_every_rank(what, message):
    found = launch(_differ, 2, what=what, timeout=20)
    assert set(found.values()) == {f"RuntimeError: {message}"}


def _die(rank, size, dead):
    block, x = MambaBlock(8, d_state=4), torch.randn(1, 9, 8)
    with parallel.context():
        block(x)
        if rank in dead:
            os._exit(7)
        for _ in range(3):
            block(x)
    return ""


def test_a_rank_that_dies_is_named_on_the_others():
    found = launch(_die, 2, dead=(0,), timeout=10)
    assert list(found) == [1]
    assert found[1].startswith("RuntimeError: parallel: rank 1 of 2 failed while")
    assert "another rank has ended" in found[1]


def test_it_needs_a_process_group():
    with pytest.raises(RuntimeError, match="is not initialised"), parallel.context():
        pass
    with pytest.raises(ValueError, match="schedule must be one of"), parallel.context(schedule="ring"):
        pass
