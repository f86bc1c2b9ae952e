"""Context parallelism over gloo: outputs and gradients of one process, faults that end in one line."""

import copy
import datetime
import functools
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

from projecta import MambaBlock, accelerate, parallel
from projecta.mamba.block import State
from projecta.mrss import BANDS
from tests.cases import use_interpreter

LENGTH, BATCH, WIDTH = 23, 2, 8
CLOSE = 1e-6  # of the largest number of a tensor


def _port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _work(rank, size, port, job, options, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    seconds = options.pop("timeout", None)
    limit = datetime.timedelta(seconds=seconds or 60)
    try:
        if "ports" not in options:  # a job that makes its own groups
            dist.init_process_group("gloo", rank=rank, world_size=size, timeout=limit)
        results.put((rank, job(rank, size, **options)))
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if seconds else traceback.format_exc()
        results.put((rank, text))


def launch(job, size, **options):
    """What `job(rank, size)` returns on each rank; the text of an error as a string."""
    os.environ.pop("TRITON_INTERPRET", None)
    if options.pop("interpreted", False):
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
        context = mp.get_context("spawn")
    else:
        context = mp.get_context("forkserver")  # which has imported torch
        context.set_forkserver_preload(["torch.distributed", "torch.distributed.fsdp", "projecta.mamba"])
    results, port = context.Queue(), _port()
    processes = [
        context.Process(target=_work, args=(r, size, port, job, options, results)) for r in range(size)
    ]
    for process in processes:
        process.start()
    expected = size - len(options.get("dead", ()))
    found = dict(results.get(timeout=180) for _ in range(expected))
    for process in processes:
        process.join(30)
        process.kill()
    return found


def _blocks(layers=2, backend="auto"):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(MambaBlock(WIDTH, d_state=4, backend=backend) for _ in range(layers)))


def _pieces(size, schedule):
    """Uneven: the first rank holds the most steps, the third fewer than the filter spans if it may."""
    ends = [0, 11, 15, 17 if schedule == "pass" else 18][:size]
    return list(zip(ends, [*ends[1:], LENGTH], strict=True))


def _error(got, wanted):
    return float((got.detach() - wanted.detach()).abs().max() / wanted.detach().abs().max().clamp_min(1e-6))


def _compare(rank, size, model, run, x, schedule, whole=None):
    """The largest error of output and gradients of one piece against one process with the whole sequence.

    In float64, unless the model of one process is given: what is left is the rounding of the states, which
    travel as float32."""
    if whole is None:
        model, x = model.double(), x.double() if x.is_floating_point() else x
        whole = copy.deepcopy(model)
    wanted = run(whole, x)
    weight = torch.linspace(-1, 1, wanted.numel()).view_as(wanted)
    (wanted * weight).sum().backward()
    first, last = _pieces(size, schedule)[rank]
    with parallel.context(schedule=schedule):
        y = run(model, x[:, first:last])
    (y * weight[:, first:last]).sum().backward()
    parallel.average_gradients(model.parameters())
    errors = [_error(y, wanted[:, first:last])]
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert p.grad is not None, name
        errors.append(_error(size * p.grad, q.grad))
    with torch.no_grad(), parallel.context(schedule=schedule):
        assert torch.equal(run(model, x[:, first:last]), y)
    return max(errors)


def _sequence():
    torch.manual_seed(1)
    return torch.randn(BATCH, LENGTH, WIDTH)


def blocks(rank, size, schedule):
    return _compare(rank, size, _blocks(), lambda m, x: m(x), _sequence(), schedule)


def checkpointed(rank, size, schedule):
    def run(model, x):
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=False, context_fn=parallel.checkpoint_contexts)
        return x

    return _compare(rank, size, _blocks(), run, _sequence(), schedule)


def _language_model():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=20, hidden_size=WIDTH, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config), torch.randint(0, 20, (BATCH, LENGTH))


def transformers_group(rank, size, schedule):
    """The group is the model's own, and its layers are computed again in the backward pass."""
    model, ids = _language_model()
    whole, (first, last) = copy.deepcopy(model), _pieces(size, schedule)[rank]
    accelerate(model, group=dist.group.WORLD)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, "context_fn": parallel.checkpoint_contexts})
    logits = model.train()(ids[:, first:last], use_cache=False).logits
    logits.square().sum().backward()
    accelerate(whole)
    wanted = whole(ids, use_cache=False).logits
    wanted.square().sum().backward()
    parallel.average_gradients(model.parameters())
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    return max(_error(logits, wanted[:, first:last]), *(_error(size * p.grad, q.grad) for p, q in pairs))


def transformers_model(rank, size, schedule):
    model, ids = _language_model()
    accelerate(model)
    return _compare(rank, size, model, lambda m, x: m(x, use_cache=False).logits, ids, schedule)


def states(rank, size, schedule):
    """Gradients of the state before the sequence, and through the state after it."""
    block = _blocks(1)[0]
    torch.manual_seed(2)
    start = State(torch.randn(BATCH, 2 * WIDTH, 3), torch.randn(BATCH, 2 * WIDTH, 4))
    wholes, owns = ([t.clone().requires_grad_() for t in start] for _ in range(2))
    x = _sequence()
    wanted, after = block(x, State(*wholes), return_state=True)
    (wanted.sum() + sum((t * t).sum() for t in after)).backward()
    first, last = _pieces(size, schedule)[rank]
    with parallel.context(schedule=schedule):
        y, ended = block(x[:, first:last], State(*owns), return_state=True)
        loss = y.sum()
        if rank == size - 1:
            loss = loss + sum((t * t).sum() for t in ended)
        loss.backward()
    errors = [_error(y, wanted[:, first:last])]
    if rank == 0:
        errors += [_error(t.grad, s.grad) for t, s in zip(owns, wholes, strict=True)]
    if rank == size - 1:
        errors += [_error(t, s) for t, s in zip(ended, after, strict=True)]
    return max(errors)


def packed(rank, size, schedule):
    bounds = torch.tensor([0, 2, 11, 14, LENGTH], dtype=torch.int32)  # one begins at a cut, one goes on
    x, model = _sequence()[:1], _blocks(1)
    pieces = _pieces(size, schedule)[rank]

    def run(model, x):
        own = bounds if x.shape[1] == LENGTH else parallel.split_packed(bounds, *pieces)
        return model[0](x, cu_seqlens=own)

    return _compare(rank, size, model, run, x, schedule)


def helpers(rank, size, schedule):
    whole = torch.arange(2 * LENGTH).view(2, LENGTH)
    mine = parallel.split(whole)
    assert torch.equal(parallel.join(mine), whole)
    first, last = parallel.bounds(LENGTH)
    assert torch.equal(mine, whole[:, first:last])
    uneven = whole[:, : 3 + rank].float()
    assert parallel.join(uneven).shape == (2, sum(3 + r for r in range(size)))
    p = torch.nn.Parameter(torch.ones(3))
    losses = torch.arange(float(LENGTH)).tensor_split(size)[rank]
    parallel.mean_loss((losses * p[0]).sum(), len(losses)).backward()
    parallel.average_gradients([p])
    return abs(float(p.grad[0]) / float(torch.arange(float(LENGTH)).mean()) - 1)


CASES = {
    f"{job.__name__} {schedule}": (job, schedule)
    for job in (blocks, checkpointed, transformers_model, transformers_group, states, packed, helpers)
    for schedule in parallel.SCHEDULES
    if schedule == "pass" or job not in (packed, helpers, transformers_group)
}


def mesh(rank, size, schedule):
    """Two sequences at once, each over two ranks; FSDP2 shards the weights over the sequences."""
    from torch.distributed.fsdp import fully_shard

    grid = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pieces", "batches"))
    model = _blocks()
    whole, x = copy.deepcopy(model), _sequence()
    losses = []
    for layer in model:
        fully_shard(layer, mesh=grid)
    fully_shard(model, mesh=grid)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, whole)]
    mine = x[grid["batches"].get_local_rank()][None]
    first, last = _pieces(2, "pass")[grid["pieces"].get_local_rank()]
    for _ in range(3):
        with parallel.context(grid["pieces"]):
            total = model(mine[:, first:last]).square().sum()
            parallel.mean_loss(total, WIDTH * (last - first)).backward()
        loss = whole(x).square().mean()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        dist.all_reduce(total := total.detach())
        losses.append(abs(total.item() / x.numel() / loss.item() - 1))
    state = {name: t.full_tensor() for name, t in model.state_dict().items()}
    loaded = _blocks()
    loaded.load_state_dict(state)  # a checkpoint of a sharded run, on one process
    errors = [_error(p, q) for p, q in zip(loaded.parameters(), whole.parameters(), strict=True)]
    return max(losses + errors)


SIZES = (1, 2, 3, 4)


def _every_size(rank, size, ports):
    """Every case in groups of the first 4, 3... ranks: the processes start once, and warm up together."""
    found = {}
    for ranks, port in zip(reversed(SIZES), ports, strict=True):
        if rank >= ranks:
            continue
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
        cases = CASES | ({"mesh with FSDP2": (mesh, "pass")} if ranks == 4 else {})
        for name, (job, schedule) in cases.items():
            try:
                found[name, ranks] = job(rank, ranks, schedule)
            except Exception:
                found[name, ranks] = traceback.format_exc()
        dist.barrier()  # a rank that ends its connections fails those that still connect
        dist.destroy_process_group()
    return found


def _compile(dtype):
    """Leave the kernels on disk: each rank would compile them."""
    model, x = _blocks(backend="cpu").to(dtype), _sequence().to(dtype)
    model(x).sum().backward()


@functools.cache
def _results():
    _compile(torch.float64)
    return launch(_every_size, max(SIZES), ports=[_port() for _ in SIZES])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_it_is_as_one_process(case, size):
    if "transformers" in case:
        pytest.importorskip("transformers")
    found = _results()
    assert all(isinstance(own, dict) for own in found.values()), found
    errors = [found[rank][case, size] for rank in range(size)]
    assert all(isinstance(error, float) and error < CLOSE for error in errors), errors


def test_a_mesh_with_fsdp():
    errors = [own["mesh with FSDP2", 4] for own in _results().values()]
    assert all(isinstance(error, float) and error < 1e-5 for error in errors), errors


def _fused(rank, size):
    """The GPU's node, which sends and receives while it computes; with a checkpoint and without."""
    use_interpreter()
    from projecta.mamba.layer import fused

    model = _blocks(backend="triton")
    assert fused(model[0], _sequence(), "triton")[0] is not None

    def run(model, x):
        x = model[0](x)
        return checkpoint(model[1], x, use_reentrant=False, context_fn=parallel.checkpoint_contexts)

    return _compare(rank, size, model, run, _sequence(), "pass", _blocks(backend="cpu"))


def test_the_node_of_the_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # restored after the test
    _compile(torch.float32)
    for rank, error in launch(_fused, 3, interpreted=True).items():
        assert isinstance(error, float), error
        assert error < 1e-5, (rank, error)


def _differ(rank, size, what):
    block = MambaBlock(8, d_state=4).to(torch.bfloat16 if (what == "dtype" and rank == 1) else torch.float32)
    batch = 3 if what == "batch" and rank == 1 else 2
    x = torch.randn(batch, 2 if what == "length" and rank else 9, 8, dtype=block.in_proj.weight.dtype)
    with parallel.context(schedule="gather"):
        block(x)
    return ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("dtype", "all ranks must have the same dtype; rank 0 has torch.float32, rank 1 torch.bfloat16."),
        ("batch", "all ranks must have the same batch and width; rank 0 has (2, 8), rank 1 (3, 8)."),
        (
            "length",
            'with schedule "gather" each rank needs at least d_conv - 1 = 3 steps; rank 1 has 2. Take "pass".',
        ),
    ],
)
def test_ranks_that_differ_say_so_on_every_rank(what, message):
    found = launch(_differ, 2, what=what, timeout=20)
    assert set(found.values()) == {f"RuntimeError: parallel: {message}"}


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


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_it_needs_a_process_group():
    with pytest.raises(RuntimeError, match="is not initialised"), parallel.context():
        pass
    with pytest.raises(ValueError, match="schedule must be one of"), parallel.context(schedule="ring"):
        pass


@pytest.mark.parametrize("inside", [True, False])
def test_a_plain_checkpoint_is_refused(alone, inside):
    block, x = _blocks(1)[0], _sequence()
    with parallel.context():
        y = checkpoint(block, x, use_reentrant=False)
        if inside:
            with pytest.raises(RuntimeError, match=r"context_fn=parallel\.checkpoint_contexts"):
                y.sum().backward()
    if not inside:
        with pytest.raises(RuntimeError, match=r"context_fn=parallel\.checkpoint_contexts"):
            y.sum().backward()


def test_what_it_cannot_do_is_refused(alone):
    bounds = torch.tensor([0, LENGTH], dtype=torch.int32)
    with parallel.context(schedule="gather"), pytest.raises(ValueError, match="cu_seqlens must be None with"):
        _blocks(1)[0](_sequence()[:1], cu_seqlens=bounds)
    with parallel.context(), pytest.raises(ValueError, match="mrss must be None within"):
        MambaBlock(WIDTH, mrss=BANDS)(_sequence())


def test_accelerate_takes_a_group(alone):
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=20, hidden_size=WIDTH, num_hidden_layers=2, state_size=4)
    model, ids = transformers.MambaForCausalLM(config).eval(), torch.randint(0, 20, (1, 5))
    wanted = model(ids, use_cache=False).logits
    with accelerate(model, group=dist.group.WORLD):
        assert model.backbone.layers[0].mixer.forward.where.schedule == "pass"
        assert _error(model(ids, use_cache=False).logits, wanted) < 1e-5
        with pytest.raises(ValueError, match="cache must be None where ranks share a sequence"):
            model(ids)
        assert copy.deepcopy(model).backbone.layers[0].mixer.forward.where is None


def test_a_short_stack_gathers():
    assert [parallel.choose_schedule(layers, 4) for layers in (1, 2, 24)] == ["gather", "pass", "pass"]
    assert [parallel.choose_schedule(24, ranks) for ranks in (64, 128)] == ["pass", "gather"]
