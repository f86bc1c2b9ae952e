"""Small models in the style of published ones, as a script that imports mamba_ssm: trains some steps.

Prints each model's loss before and after. A model uses the names that its family imports.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn


class Vim(nn.Module):
    """Patches, a class token in the middle, blocks that read both ways, add and norm in one call."""

    def __init__(self):
        super().__init__()
        from mamba_ssm.modules.mamba_simple import Mamba
        from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn

        self.fused = rms_norm_fn, layer_norm_fn
        self.patch = nn.Conv2d(1, 16, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.mixers = nn.ModuleList(
            Mamba(16, d_state=4, layer_idx=i, bimamba_type="v2", if_devide_out=True) for i in range(2)
        )
        self.norms = nn.ModuleList(RMSNorm(16, eps=1e-5) for _ in range(3))
        self.head = nn.Linear(16, 3)

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2)
        half = x.shape[1] // 2
        x = torch.cat([x[:, :half], self.token.expand(len(x), -1, -1), x[:, half:]], 1)
        residual = None
        for mixer, norm in zip(self.mixers, self.norms, strict=False):
            x, residual = self.fused[0](
                x,
                norm.weight,
                norm.bias,
                residual=residual,
                prenorm=True,
                residual_in_fp32=True,
                eps=norm.eps,
            )
            x = mixer(x)
        last = self.norms[-1]
        x = self.fused[1](
            x, last.weight, last.bias, eps=last.eps, residual=residual, prenorm=False, residual_in_fp32=True,
            is_rms_norm=True,
        )  # fmt: skip
        return self.head(x[:, half])


class VMamba(nn.Module):
    """Four directions of an image as groups of one scan, by the compiled module in an autograd function."""

    def __init__(self):
        super().__init__()
        import selective_scan_cuda_oflex

        class Scan(torch.autograd.Function):
            @staticmethod
            def forward(ctx, u, delta, A, B, C, D, bias):
                out, x = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, bias, True, 1, True)
                ctx.save_for_backward(u, delta, A, B, C, D, bias, x)
                return out

            @staticmethod
            def backward(ctx, grad):
                *inputs, x = ctx.saved_tensors
                return tuple(selective_scan_cuda_oflex.bwd(*inputs, grad, x, True, 1))

        self.scan, self.width, self.states = Scan.apply, 8, 4
        self.inwards, self.outwards, self.head = nn.Conv2d(1, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 3)
        self.x_proj = nn.Parameter(torch.randn(4, 1 + 2 * 4, 8) / 3)
        self.dt_weight = nn.Parameter(torch.randn(4, 8, 1) / 2)
        self.dt_bias = nn.Parameter(torch.full((4 * 8,), -3.0))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, 5)).repeat(4 * 8, 1))
        self.D = nn.Parameter(torch.ones(4 * 8))

    def forward(self, images):
        x = self.inwards(images)
        b, d, h, w = x.shape
        rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
        ways = torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], 1)  # (b, 4, d, l)
        dt, B, C = torch.einsum("bkdl,kcd->bkcl", ways, self.x_proj).split([1, self.states, self.states], 2)
        delta = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_weight)
        y = self.scan(
            ways.reshape(b, 4 * d, -1), delta.reshape(b, 4 * d, -1), -torch.exp(self.A_log), B.contiguous(),
            C.contiguous(), self.D, self.dt_bias,
        ).view(b, 4, d, -1)  # fmt: skip
        y = y[:, :2] + y[:, 2:].flip(-1)
        y = y[:, 0] + y[:, 1].view(b, d, w, h).transpose(2, 3).flatten(2)
        return self.head(self.outwards(y.transpose(1, 2)).mean(1))


class MambaVision(nn.Module):
    """A mixer whose scan has half of the channels; the other half is convolved, and both are joined."""

    def __init__(self):
        super().__init__()
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        self.scan, self.states = selective_scan_fn, 4
        self.patch, self.in_proj = nn.Conv2d(1, 16, 4, 4), nn.Linear(16, 16)
        self.x_conv, self.z_conv = (nn.Conv1d(8, 8, 3, padding="same", groups=8) for _ in range(2))
        self.x_proj, self.dt_proj = nn.Linear(8, 1 + 2 * 4, bias=False), nn.Linear(1, 8)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, 5)).repeat(8, 1))
        self.D, self.out_proj, self.head = nn.Parameter(torch.ones(8)), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, images):
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, 1)
        x, z = F.silu(self.x_conv(x)), F.silu(self.z_conv(z))
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([1, self.states, self.states], -1)
        y = self.scan(
            x, self.dt_proj(dt).transpose(1, 2), -torch.exp(self.A_log.float()),
            B.transpose(1, 2).contiguous(), C.transpose(1, 2).contiguous(), self.D.float(), z=None,
            delta_bias=self.dt_proj.bias.float(), delta_softplus=True, return_last_state=None,
        )  # fmt: skip
        return self.head(self.out_proj(torch.cat([y, z], 1).transpose(1, 2)).mean(1))


class VMUNet(nn.Module):
    """Down, four directions by `selective_scan_fn`, up again, with a skip."""

    def __init__(self):
        super().__init__()
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

        self.scan, self.reference = selective_scan_fn, selective_scan_ref
        self.down, self.up = nn.Conv2d(1, 8, 4, 4), nn.ConvTranspose2d(8, 3, 4, 4)
        self.weights = nn.Linear(8, 8 + 2 * 4)
        self.A_log = nn.Parameter(torch.zeros(16, 4))

    def forward(self, images):
        x = self.down(images)
        b, d, h, w = x.shape
        flat = x.flatten(2)
        delta, B, C = self.weights(flat.transpose(1, 2)).transpose(1, 2).split([8, 4, 4], 1)
        both = [torch.cat([t, t.flip(-1)], 1) for t in (flat, delta)]
        B, C = (torch.stack([t, t.flip(-1)], 1) for t in (B, C))
        arguments = *both, -torch.exp(self.A_log), B, C, None, None, None, True
        y = self.scan(*arguments)
        assert torch.allclose(y, self.reference(*arguments), atol=1e-4)
        y = y[:, :d] + y[:, d:].flip(-1)
        return self.up(x + y.view(b, d, h, w)).mean((2, 3))


class UMamba(nn.Module):
    """A volume's voxels as one sequence, through a plain Mamba between convolutions."""

    def __init__(self):
        super().__init__()
        from mamba_ssm import Mamba

        self.conv, self.norm = nn.Conv3d(1, 8, 2, 2), nn.LayerNorm(8)
        self.mamba = Mamba(d_model=8, d_state=4, d_conv=4, expand=2)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        volume = images.view(len(images), 1, 4, 8, 8)
        x = self.conv(volume)
        tokens = x.flatten(2).transpose(1, 2)
        return self.head((self.mamba(self.norm(tokens)) + tokens).mean(1))


class Caduceus(nn.Module):
    """Both strands with shared weights: a Mamba on a sequence and on its flip, and mamba-ssm's Block."""

    def __init__(self):
        super().__init__()
        from functools import partial

        from mamba_ssm.modules.mamba_simple import Block, Mamba
        from mamba_ssm.ops.triton.layer_norm import RMSNorm

        class BothWays(nn.Module):
            def __init__(self, dim):
                super().__init__()
                self.forwards, self.backwards = (Mamba(dim, d_state=4) for _ in range(2))
                for shared in ("in_proj", "out_proj"):
                    setattr(self.backwards, shared, getattr(self.forwards, shared))

            def forward(self, x, inference_params=None):
                return self.forwards(x) + self.backwards(x.flip(1)).flip(1)

        self.embed = nn.Embedding(4, 8)
        self.blocks = nn.ModuleList(
            Block(
                8, BothWays, norm_cls=partial(RMSNorm, eps=1e-5), fused_add_norm=True, residual_in_fp32=True
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        x, residual = self.embed((images.flatten(1)[:, :32] * 4).long().clamp(0, 3)), None
        for block in self.blocks:
            x, residual = block(x, residual)
        return self.head((x + residual).mean(1))


class AudioMamba(nn.Module):
    """The functions between in_proj and out_proj, called directly, both ways."""

    def __init__(self):
        super().__init__()
        from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn, mamba_inner_fn_no_out_proj

        self.inner, self.no_out = bimamba_inner_fn, mamba_inner_fn_no_out_proj
        self.embed, self.in_proj = nn.Linear(16, 8), nn.Linear(8, 32, bias=False)
        self.conv, self.x_proj = nn.Conv1d(16, 16, 4, groups=16), nn.Linear(16, 1 + 8, bias=False)
        self.dt_proj, self.out_proj, self.head = nn.Linear(1, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.A_log, self.A_b_log = (nn.Parameter(torch.zeros(16, 4)) for _ in range(2))
        self.D = nn.Parameter(torch.ones(16))

    def forward(self, images):
        xz = self.in_proj(self.embed(images[:, 0])).transpose(1, 2)
        A, A_b = -torch.exp(self.A_log), -torch.exp(self.A_b_log)
        own = self.conv.weight, self.conv.bias, self.x_proj.weight, self.dt_proj.weight
        y = self.inner(
            xz, *own, self.out_proj.weight, self.out_proj.bias, A, A_b, None, None, self.D,
            delta_bias=self.dt_proj.bias, delta_softplus=True,
        )  # fmt: skip
        other = self.no_out(xz, *own, A, None, None, self.D, delta_bias=self.dt_proj.bias)
        return self.head((y + self.out_proj(other.transpose(1, 2))).mean(1))


class SDMamba(nn.Module):
    """Channels of a time series as tokens, a Mamba each way."""

    def __init__(self):
        super().__init__()
        from mamba_ssm import Mamba

        self.embed, self.norm, self.head = nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.first, self.second = (Mamba(d_model=8, d_state=4, d_conv=2, expand=1) for _ in range(2))

    def forward(self, images):
        x = self.embed(images[:, 0])
        return self.head(self.norm(x + self.first(x) + self.second(x.flip(1)).flip(1)).mean(1))


MODELS = {
    "vim": Vim, "vmamba": VMamba, "mamba_vision": MambaVision, "vm_unet": VMUNet, "u_mamba": UMamba,
    "caduceus": Caduceus, "audio_mamba": AudioMamba, "s_d_mamba": SDMamba,
}  # fmt: skip


def train(family: str) -> tuple[float, float]:
    """The losses of the first step and of the last."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = MODELS[family]().to(device)
    images = torch.rand(6, 1, 16, 16, device=device)
    labels = torch.tensor([0, 1, 2, 0, 1, 2], device=device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing, missing
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, *train(name))
