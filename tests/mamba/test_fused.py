"""The block as one node, in Triton's interpreter: against the block in float64, and when it does not apply."""

import copy

import pytest
import torch

CASES = {
    "float32": {},
    "states": {"l": 9, "state": True},
    "float16": {"dtype": torch.float16, "l": 8},
    "bfloat16": {"dtype": torch.bfloat16, "l": 8},
    "no biases": {"options": {"conv_bias": False, "bias": False}},
    "wide": {"options": {"d_state": 17, "d_conv": 2, "dt_rank": 3}},
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def _errors(b=2, l=11, dtype=torch.float32, state=False, options=None):
    """Errors of output, last state and every gradient, relative to the largest value of each."""
    from projecta.mamba import MambaBlock, State
    from projecta.mamba.layer import fused

    torch.manual_seed(0)
    block = MambaBlock(8, **{"d_state": 4, "bias": True, **(options or {})}, backend="triton", dtype=dtype)
    wide = copy.deepcopy(block).double()
    wide.backend = "reference"
    x = torch.randn(b, l, 8, dtype=dtype)
    assert fused(block, x, "triton")[0] is not None
    assert fused(wide, x.double(), "triton")[0] is None
    given = [x]
    if state:
        given += [torch.randn(b, 16, 3, dtype=dtype), torch.randn(b, 16, 4)]
    results = []
    for model, tensors in ((block, given), (wide, [t.double() for t in given])):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out, last = model(leaves[0], State(*leaves[1:]) if state else None, return_state=True)
        torch.manual_seed(1)
        loss = sum((t * torch.randn(t.shape, dtype=torch.float64).to(t)).sum() for t in (out, *last))
        grads = torch.autograd.grad(loss, [*leaves, *model.parameters()])
        with torch.no_grad():
            results.append([out, *last, model(leaves[0], State(*leaves[1:]) if state else None), *grads])
    names = ["out", "conv", "ssm", "inference", *(f"input {i}" for i in range(len(given)))]
    names += [name for name, _ in block.named_parameters()]
    return {
        name: float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30))
        for name, a, b in zip(names, *results, strict=True)
    }


@pytest.mark.parametrize("case", CASES)
def test_the_node_agrees_with_the_reference(interpreter, case):
    found = interpreter.submit(_errors, **CASES[case]).result(timeout=300)
    for name, error in found.items():
        assert error <= TOLERANCE[CASES[case].get("dtype", torch.float32)], f"{name}: {error}"


def _check_steps():
    from projecta.mamba import MambaBlock

    block = MambaBlock(8, d_state=5, dt_rank=3, backend="triton")
    for b in (2, 9):  # few rows, and many: one kernel less, or a product for delta
        x = torch.randn(b, 7, 8)
        with torch.no_grad():
            state = block.initial_state(b)
            steps = torch.stack([block.step(x[:, t], state) for t in range(7)], 1)
            whole, last = block(x, return_state=True)
        assert torch.allclose(steps, whole, atol=1e-6)
        assert torch.allclose(state.ssm, last.ssm, atol=1e-6)
        assert torch.allclose(state.conv, last.conv, atol=1e-6)


def test_steps_equal_the_sequence(interpreter):
    interpreter.submit(_check_steps).result(timeout=300)


def _check_general_way():
    """Hooks, adapters, float64 and tracers take the layer's own modules; autocast takes the node."""
    from projecta.mamba import MambaBlock
    from projecta.mamba.layer import fused

    x = torch.randn(1, 5, 8)
    block = MambaBlock(8, backend="triton")
    assert fused(block, x, "triton")[0] is not None
    assert fused(block, x, "vectorised")[0] is None
    assert fused(copy.deepcopy(block).double(), x.double(), "triton")[0] is None
    assert fused(block, x.half(), "triton")[0] is None  # other dtype than the weights: torch's own error
    calls = []
    hook = block.x_proj.register_forward_hook(lambda *args: calls.append(1))
    assert torch.allclose(block(x), MambaBlock.forward(block, x))
    assert len(calls) == 2
    hook.remove()
    adapted = copy.deepcopy(block)
    adapted.in_proj = torch.nn.Sequential(adapted.in_proj)
    assert fused(adapted, x, "triton")[0] is None
    with torch.autocast("cpu", torch.bfloat16):
        _, weights = fused(block, x, "triton")
        assert weights.in_proj.dtype == torch.bfloat16
        y = block(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert block.in_proj.weight.grad.dtype == torch.float32


def test_what_the_node_cannot_run_goes_the_general_way(interpreter):
    interpreter.submit(_check_general_way).result(timeout=300)


def _second_derivative():
    from projecta.mamba import MambaBlock

    block, x = MambaBlock(8, backend="triton"), torch.randn(1, 5, 8, requires_grad=True)
    (first,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    try:
        first.sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_second_derivatives_raise(interpreter):
    message = interpreter.submit(_second_derivative).result(timeout=300)
    assert message.startswith("MambaBlock: backend must be 'reference' for second derivatives")


def _check_compiled_decoding():
    """A decoding step traces into one graph, which overwrites the cache as the plain call does."""
    from transformers import MambaConfig, MambaForCausalLM

    from projecta import accelerate

    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, state_size=4)
    ).eval()
    ids = torch.randint(0, 20, (2, 5))
    found = []
    with accelerate(model, backend="triton"), torch.no_grad():
        for compiled in (False, True):
            cache = model(ids, use_cache=True).cache_params

            def decode(token, cache=cache):
                return model(token, cache_params=cache, use_cache=True).logits

            call = torch.compile(decode, fullgraph=True, backend="aot_eager") if compiled else decode
            logits = [call(ids[:, t : t + 1]) for t in range(3)]
            states = [t for layer in cache.layers for t in (layer.conv_states[0], layer.recurrent_states[0])]
            found.append([*logits, *states])
    for plain, traced in zip(*found, strict=True):
        assert torch.allclose(plain, traced, atol=1e-6)


def test_decoding_compiles_without_a_break(interpreter):
    interpreter.submit(_check_compiled_decoding).result(timeout=300)


def _check_accelerated():
    """Logits, prefill in pieces, and decoding of an accelerated model on the node equal transformers'."""
    from transformers import MambaConfig, MambaForCausalLM

    from projecta import accelerate

    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)
    ).eval()
    ids = torch.randint(0, 20, (2, 9))
    with torch.no_grad():
        wanted, tokens = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
        with accelerate(model, backend="triton"):
            assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
            assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), tokens)
            cache = model(ids[:, :4], use_cache=True).cache_params
            rest = model(ids[:, 4:], cache_params=cache, use_cache=True)
    assert torch.allclose(rest.logits, wanted[:, 4:], atol=1e-5)


def test_accelerated_models_run_on_the_node(interpreter):
    interpreter.submit(_check_accelerated).result(timeout=300)
