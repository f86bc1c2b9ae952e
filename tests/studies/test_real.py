"""Real weights of an ONNX file in transformers' model. Needs the files that `nox -s fidelity` downloads."""

import importlib.util

import pytest
import torch
from asv_runner.benchmarks.mark import SkipNotImplemented

from studies import real

if importlib.util.find_spec("onnxruntime") is None:
    pytest.skip("onnxruntime is not installed", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def data():
    try:
        real.onnx_file()
    except SkipNotImplemented as reason:
        pytest.skip(str(reason))


def test_the_mapped_model_is_the_onnx_graph():
    pixels = real.natural(4)[0]
    with torch.inference_mode():
        mine = real.dinov2()(pixel_values=pixels).last_hidden_state
    truth = real.run_onnx("/backbone/layernorm/Add_1_output_0")(pixels)
    assert (mine - truth).abs().max() <= 1e-4


def test_the_saliency_is_the_graphs_own():
    maps = real.run_onnx()(real.natural(2)[0])
    assert maps.shape == (2, 1, 224, 224)
    assert maps.std() > 0.05
