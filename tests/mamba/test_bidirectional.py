"""A bidirectional block is the sum of a block and of another one on the flipped sequence."""

import pytest
import torch

from projecta import MambaBlock


def _three(**options):
    """A bidirectional block, and the two blocks of its directions."""
    torch.manual_seed(0)
    block = MambaBlock(8, d_state=3, bidirectional=True, **options)
    weights = block.state_dict()
    back = {name.replace("_b", "", 1): t for name, t in weights.items() if "_b" in name.partition(".")[0]}
    ahead = {name: t for name, t in weights.items() if "_b" not in name.partition(".")[0]}
    blocks = []
    for own in (ahead, ahead | back):
        one = MambaBlock(8, d_state=3, **options)
        one.load_state_dict(own)
        blocks.append(one)
    return block, *blocks


def _of_both(ahead, back, x, cu_seqlens=None):
    mirrored = None if cu_seqlens is None else (x.shape[1] - cu_seqlens).flip(0)
    y = ahead(x, cu_seqlens=cu_seqlens) + back(x.flip(1), cu_seqlens=mirrored).flip(1)
    return y if back.out_proj.bias is None else y - back.out_proj.bias


@pytest.mark.parametrize("on", ["auto", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_output_and_gradients(on, packed):
    block, ahead, back = (m.double() for m in _three(backend=on, bias=True))
    bounds = torch.tensor([0, 4, 17], dtype=torch.int32) if packed else None
    x = torch.randn(1 if packed else 2, 17, 8, dtype=torch.float64)
    ours, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = block(ours, cu_seqlens=bounds), _of_both(ahead, back, wanted, bounds)
    torch.testing.assert_close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(ours.grad, wanted.grad)
    torch.testing.assert_close(
        block.in_proj.weight.grad, ahead.in_proj.weight.grad + back.in_proj.weight.grad
    )
    torch.testing.assert_close(block.A_log.grad, ahead.A_log.grad)
    torch.testing.assert_close(block.A_b_log.grad, back.A_log.grad)
    torch.testing.assert_close(block.conv1d_b.weight.grad, back.conv1d.weight.grad)


def _check_on_triton(halve):
    """The GPU's node runs each direction; gradients of what both use are sums."""
    from projecta.mamba.layer import fused, run_both_ways

    block, ahead, back = _three(backend="triton", bias=True)
    x = torch.randn(2, 21, 8)
    assert fused(block, x, "triton")[0] is not None
    ours, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = run_both_ways(block, ours, "triton", halve=halve), _of_both(ahead, back, wanted)
    if halve:
        z = (z + block.out_proj.bias) / 2
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.dt_proj_b.weight.grad, back.dt_proj.weight.grad, rtol=1e-4, atol=1e-5)
    both = ahead.in_proj.weight.grad + back.in_proj.weight.grad
    torch.testing.assert_close(block.in_proj.weight.grad, both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("halve", [False, True])
def test_the_node_of_the_gpu(interpreter, halve):
    interpreter.submit(_check_on_triton, halve).result(timeout=300)


def test_what_needs_one_direction_says_so():
    block = MambaBlock(8, bidirectional=True)
    x = torch.randn(1, 5, 8)
    with pytest.raises(ValueError, match="MambaBlock: bidirectional must be False for a state"):
        block(x, return_state=True)
    with pytest.raises(ValueError, match=r"MambaBlock\.step: bidirectional must be False for a step"):
        block.step(x[:, 0], MambaBlock(8).initial_state(1))
    with pytest.raises(ValueError, match="mrss must be None if the block is bidirectional"):
        MambaBlock(8, bidirectional=True, mrss=((0.5, 1), (0.5, 8)))


def test_it_compiles():
    block = MambaBlock(8, d_state=3, bidirectional=True)
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x))
