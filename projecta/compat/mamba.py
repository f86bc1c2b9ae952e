"""mamba-ssm's `Mamba`, with the bidirectional kinds of Vision Mamba, on `projecta.MambaBlock`."""

from typing import Any

import torch
from torch import Tensor, nn

from projecta._checks import Checker
from projecta.compat.scan import bimamba_inner_fn
from projecta.conv import last_inputs
from projecta.mamba import MambaBlock, State
from projecta.mamba.layer import run_both_ways

KINDS = ("none", "v1", "v2")


class Mamba(MambaBlock):
    """The Mamba block with mamba-ssm's arguments, attributes, cache and weights; see `projecta.MambaBlock`.

    Args:
        use_fast_path: changes nothing: there is one path. layer_idx: the layer's place in a cache.
        bimamba_type: "none"; "v1": the sum of both directions, whose rates differ (A_b_log); "v2": the
            reverse direction has its own convolution, projections and rates (names ending in _b).
        if_divide_out: halve the sum of both directions ("v2"); also spelled if_devide_out.
        init_layer_scale: multiply the output by a weight gamma (d_model,) of this initial value.

    Sources: Gu & Dao (2023), section 3.4; Zhu et al., "Vision Mamba" (2024), section 3.3.
    """

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: float = 2,
        dt_rank: int | str = "auto", dt_min: float = 0.001, dt_max: float = 0.1, dt_init: str = "random",
        dt_scale: float = 1.0, dt_init_floor: float = 1e-4, conv_bias: bool = True, bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None, device: Any = None, dtype: torch.dtype | None = None,
        bimamba_type: str | None = "none", if_divide_out: bool = False,
        init_layer_scale: float | None = None, if_devide_out: bool = False,
    ):  # fmt: skip
        super().__init__(
            d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor,
            conv_bias, bias, bidirectional=bimamba_type == "v2", device=device, dtype=dtype,
        )  # fmt: skip
        Checker("Mamba").one_of("bimamba_type", bimamba_type or "none", KINDS)
        self.expand, self.use_fast_path, self.layer_idx = expand, use_fast_path, layer_idx
        self.activation, self.act = "silu", nn.SiLU()
        self.bimamba_type = bimamba_type or "none"
        self.if_divide_out = self.if_devide_out = if_divide_out or if_devide_out
        self.init_layer_scale = init_layer_scale
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), init_layer_scale, device=device, dtype=dtype))
        if self.bimamba_type == "v1":
            self.A_b_log = nn.Parameter(self.A_log.detach().clone())
            self.A_b_log._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:  # type: ignore[override]
        """Map (b, l, d_model) to the same shape. `inference_params` keeps the state between calls."""
        if self.bimamba_type != "none":
            Checker("Mamba").that(
                inference_params is None, "inference_params", "be None for both directions", "a cache"
            )
            output = self._both_ways(hidden_states)
        elif inference_params is None:
            output = super().forward(hidden_states)  # type: ignore[assignment]
        else:
            conv_state, ssm_state = self._get_states_from_cache(inference_params, len(hidden_states))
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, conv_state, ssm_state)[0]
            output, state = super().forward(hidden_states, return_state=True)
            last = self.in_proj(hidden_states[:, -self.d_conv :])[..., : self.d_inner]
            conv_state.copy_(last_inputs(last.transpose(1, 2), self.d_conv, None, None))
            ssm_state.copy_(state.ssm)  # type: ignore[arg-type]
        return output * self.gamma if self.init_layer_scale is not None else output

    def _both_ways(self, hidden_states: Tensor) -> Tensor:
        Checker("Mamba").that(
            not self.takes_pieces(), "bimamba_type", "be 'none' in parallel.context", self.bimamba_type
        )
        if self.bimamba_type == "v2":
            return run_both_ways(self, hidden_states, self.backend, halve=self.if_divide_out)
        xz = self.in_proj(hidden_states).transpose(1, 2)
        A, A_b = (-torch.exp(t.float()) for t in (self.A_log, self.A_b_log))
        return bimamba_inner_fn(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
            self.out_proj.weight, self.out_proj.bias, A, A_b, D=self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
        )  # fmt: skip

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token (b, 1, d_model); both states are overwritten and returned."""
        Checker("Mamba.step").that(
            hidden_states.dim() == 3 and hidden_states.shape[1] == 1, "hidden_states",
            "have shape (b, 1, d_model)", tuple(hidden_states.shape),
        )  # fmt: skip
        wide = ssm_state.to(torch.float64 if ssm_state.dtype == torch.float64 else torch.float32)
        output = super().step(hidden_states[:, 0], State(conv_state, wide))
        if wide is not ssm_state:
            ssm_state.copy_(wide)
        output = output * self.gamma if self.init_layer_scale is not None else output
        return output[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Zero states: conv (b, d_inner, d_conv) and ssm (b, d_inner, d_state)."""
        conv, ssm = self.conv1d.weight, self.dt_proj.weight
        shape = batch_size, self.d_inner
        return (
            torch.zeros(*shape, self.d_conv, device=conv.device, dtype=dtype or conv.dtype),
            torch.zeros(*shape, self.d_state, device=ssm.device, dtype=dtype or ssm.dtype),
        )

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        Checker("Mamba").that(self.layer_idx is not None, "layer_idx", "be given to use a cache", None)
        known = inference_params.key_value_memory_dict
        if self.layer_idx not in known:
            known[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in known[self.layer_idx]:
                state.zero_()
        return known[self.layer_idx]
