"""Vision token pruning in the CLIP ViT-B/16 vision tower, by keep ratio and batch, on real photographs."""

import functools

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.initialization import no_init_weights

from benchmarks import common

ROWS = {  # arguments of Plan, besides keep
    "input": {"at": 0, "score": "norm"},
    "early": {"at": 4, "score": "cls", "fuse": "squeeze", "mass": True},
    "evit3": {"at": (3, 6, 9), "score": "cls", "fuse": "mean"},
    "merge": {"at": (0, 2, 4, 6, 8, 10), "fuse": "bipartite", "mass": True, "semantics": "flops"},
    "checkerboard": {"score": "grid"},
    "random": {"score": "random"},
    "merging": {"at": tuple(range(12)), "fuse": "bipartite", "mass": True, "semantics": "flops"},
}
CASES = ("full", "input 0.7", "input 0.5", "merge 0.7", "merge 0.5")
CONTROLS = (
    "early 0.7", "early 0.5", "evit3 0.7", "evit3 0.5", "aligned", "resized 0.7", "resized 0.5",
    "checkerboard 0.7", "checkerboard 0.5", "random 0.7", "random 0.5", "merging 0.7", "merging 0.5",
)  # fmt: skip
SIDES = {0.7: 192, 0.5: 160}  # side of a resized image: 144 and 100 of 196 patches
VERSION = common.version(__file__)


@functools.cache
def _tower():
    """CLIP ViT-B/16's vision tower at full size; its weights repeat a million draws from a fixed seed.

    The gains of the norm before block 0 differ: with gains of 1 all tokens have the same length.
    """
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        patch_size=16, image_size=224, projection_dim=512,
    )  # fmt: skip
    with no_init_weights():  # 86 million draws take a second
        model = CLIPVisionModelWithProjection(config).eval()
    draws = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of two processes that set up at once wait for each other
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                for part in weight.view(-1).split(len(draws)):
                    part.copy_(draws[: len(part)])
            else:
                weight.fill_(name.endswith("norm.weight") or name.endswith(("norm1.weight", "norm2.weight")))
        gains = model.vision_model.pre_layrnorm.weight
        gains.copy_(torch.linspace(0.2, 1.8, len(gains)))
    torch.set_num_threads(threads)
    return model.to(common.device())


@torch.inference_mode()
def _written_out(model, pixels, at, trace, owner, masses, with_mass):
    """Reference for a tower pruned once. `trace`, `owner` and `masses` give the kept and merged tokens."""
    tower, bias = model.vision_model, None
    tokens = tower.pre_layrnorm(tower.embeddings(pixels))
    for i, block in enumerate(tower.encoder.layers):
        if i == at:
            fused = []
            for row, own in zip(tokens, owner, strict=True):
                fused.append(torch.stack([row[own == place].mean(0) for place in range(trace.shape[1])]))
            tokens = torch.stack(fused)
            bias = masses.log()[:, None, None, :] if with_mass else None
        tokens = block(tokens, bias)
    return model.visual_projection(tower.post_layernorm(tokens[:, 0]))


def plan_of(case: str):
    """The plan of a case; None means no pruning."""
    Plan = common.require("projecta.vtp", "Plan")
    name, _, keep = case.partition(" ")
    if name not in ("full", "resized", "input", "random"):
        common.require("projecta.vtp", "PRESETS")
    if name == "aligned":
        return Plan(keep=191 / 196, score="random")  # 192 of 197 tokens, a multiple of 64
    return Plan(keep=float(keep), **ROWS[name]) if name in ROWS else None


def _tokens(case: str) -> tuple[int, tuple[int, ...]]:
    """The number of embedded tokens, and the number of tokens in each block."""
    plan, embedded = plan_of(case), 197
    if case.startswith("resized"):
        embedded = (SIDES[float(case.split()[1])] // 16) ** 2 + 1
    return embedded, (embedded,) * 12 if plan is None else plan.schedule(197, 12)


def _check(case: str, plan, got, pixels) -> None:
    """Compare `got`, the output of the tower pruned once, with `_written_out`."""
    prune = common.require("projecta.vtp", "prune", formerly="projecta.clip")
    model, batch = _tower(), len(pixels)
    with prune(model, plan) as handle, torch.inference_mode():
        model(pixel_values=pixels)
    if plan.score == "norm":  # find the longest tokens independently
        with torch.inference_mode():
            tokens = model.vision_model.pre_layrnorm(model.vision_model.embeddings(pixels))
        longest = tokens[:, 1:].norm(dim=-1).topk(handle.tokens[-1] - 1).indices.sort().values + 1
        if not torch.equal(longest, handle.trace[:, 1:]):
            raise common.WrongResult(f"{case}: the tokens kept are not the longest")
    kept = handle.trace.shape[1]
    owner = handle.trace.new_full((batch, 197), -1)
    owner = owner.scatter(1, handle.trace, torch.arange(kept, device=owner.device).expand(batch, kept))
    masses = owner.new_ones(batch, kept)
    if plan.fuse != "drop":
        owner, masses = handle.owner, handle.mass
    truth = _written_out(model, pixels, plan.at, handle.trace, owner, masses, masses.max() > 1)
    common.check_close(case, got, truth, 1e-4)


@functools.cache
def _call(case: str, batch: int):
    """A call of the tower, and its images."""
    prune, plan = common.require("projecta.vtp", "prune", formerly="projecta.clip"), plan_of(case)
    model, pixels, options = _tower(), common.photographs(batch), {}
    if case.startswith("resized"):
        side = SIDES[float(case.split()[1])]
        pixels = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True)
        options = {"interpolate_pos_encoding": True}

    @torch.inference_mode()
    def run():
        if plan is None:
            return model(pixel_values=pixels, **options).image_embeds
        with prune(model, plan):
            return model(pixel_values=pixels).image_embeds

    return run, pixels


@functools.cache
def _forward(case: str, batch: int):
    """The call, after the outputs of two images are checked against `_written_out`."""
    (run, pixels), plan = _call(case, batch), plan_of(case)
    if common.CHECKED:
        return run
    got = run()
    if plan is not None and len(plan.stages) == 1:
        _check(case, plan, got[:2], pixels[:2])
    elif not torch.isfinite(got).all():
        raise common.WrongResult(f"{case}: not finite")
    return run


class _Forward(common.Suite):
    """Float32. "full" is the unpruned tower; other cases are a plan and its keep ratio."""

    params = (CASES, (8,))
    param_names = ("case", "batch")
    version = VERSION


class Vtp(_Forward):
    def setup(self, case, batch):
        _forward(case, batch)

    def time_forward(self, case, batch):
        _forward(case, batch)()


class VtpSingle(Vtp):
    """One image."""

    params = (("full", "input 0.5"), (1,))


class VtpPeak(_Forward):
    params = (("full", "input 0.5"), (8,))

    def setup(self, case, batch):
        common.return_freed_memory()
        _call(case, batch)

    def track_peak_forward(self, case, batch):
        return common.peak_mib(_call(case, batch)[0])  # `Vtp` checks the output


class VtpBound(_Forward):
    """Calculated peak: 4 b (c t + (3 c + 3 m) t') bytes for t embedded tokens and at most t' in a block.

    The embedding's output lives as long as the encoder runs. A block holds three tensors of width c (input,
    residual, input of the MLP) and three of the MLP's width m (output of its first map, gate, their product).
    """

    def track_peak_forward(self, case, batch):
        embedded, seen = _tokens(case)
        return 4 * batch * (768 * embedded + (3 * 768 + 3 * 3072) * max(seen)) / 2**20


class VtpFlops(common.Suite):
    """FLOPs of the tower divided by those of the full tower."""

    params = (CASES,)
    param_names = ("case",)
    version = VERSION
    unit = "of the full tower"

    def track_flops_ratio(self, case):
        costs, (embedded, seen) = common.require("projecta.vtp", "VIT_B16"), _tokens(case)
        patch = 2 * 3 * 16**2 * 768  # FLOPs to embed one patch
        whole = costs.of((197,) * 12) + 196 * patch
        return (costs.of(tuple(seen)) + (embedded - 1) * patch) / whole


class _Large(common.Suite):
    """Batch sizes for a large GPU."""

    params = ((*CASES, "merging 0.5"), (64, 256))
    param_names = ("case", "batch")
    version = VERSION
    timeout = 1200


class FullVtp(_Large):
    def setup(self, case, batch):
        common.require_full()
        _forward(case, batch)

    def time_forward(self, case, batch):
        _forward(case, batch)()


class FullVtpPeak(_Large):
    def setup(self, case, batch):
        common.require_full()
        common.return_freed_memory()
        _call(case, batch)

    def track_peak_forward(self, case, batch):
        return common.peak_mib(_call(case, batch)[0])  # `Vtp` checks the output


class FullVtpControl(Vtp):
    """Other plans, and controls to compare pruning with."""

    params = (CONTROLS, (8,))

    def setup(self, case, batch):
        common.require_full()
        super().setup(case, batch)


class FullVtpControlPeak(VtpPeak):
    params = (("input 0.7", "merge 0.5", *CONTROLS), (8,))

    def setup(self, case, batch):
        common.require_full()
        super().setup(case, batch)


class FullVtpControlBound(VtpBound):
    params = (CONTROLS, (8,))


class FullVtpControlFlops(VtpFlops):
    params = (CONTROLS,)
