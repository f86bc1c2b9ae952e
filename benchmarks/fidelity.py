"""What pruning does to real features, by preset: DINOv2-S/14, weights fetched by `nox -s fidelity`."""

from benchmarks import common
from studies import fidelity, real

VERSION = common.version(fidelity.__file__)


class FullFidelity(common.Suite):
    """Mean cosine of the class token to the full model's, by preset."""

    params = (("input", "early", "evit3", "merge"), fidelity.KEEP, fidelity.SETS)
    param_names = ("preset", "keep", "images")
    version = VERSION
    unit = "cosine"
    higher_is_better = True
    timeout = 600

    def setup(self, preset, keep, images):
        common.require_full()
        real.onnx_file()

    def track_cosine(self, preset, keep, images):
        presets = common.require("projecta.vtp", "PRESETS")
        return fidelity.measure(images, presets[preset], keep)["cosine"]
