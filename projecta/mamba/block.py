"""The Mamba block as a torch module; see `projecta.mamba.layer` for the formula."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from projecta import parallel
from projecta._checks import Checker
from projecta.mamba.layer import (
    check_backend,
    check_piece,
    draw_steps,
    fused,
    run,
    run_both_ways,
    run_piece,
    step_layer,
)
from projecta.mrss import Bands, MrssState, check_bands


class State(NamedTuple):
    """The state of a block after a part of a sequence.

    conv: the last inputs of the convolution (b, d_inner, d_conv - 1). ssm: the state of the scan (b, d_inner,
    d_state), or with MRSS a `MrssState`.
    """

    conv: Tensor
    ssm: Tensor | MrssState


class MambaBlock(nn.Module):
    """The Mamba block; a drop-in for mamba-ssm's `Mamba`, whose checkpoints it loads.

    Args:
        d_model: width of input and output. d_state: states per channel. d_conv: width of the convolution.
        expand: d_inner / d_model. dt_rank: rank of the step size's projection, "auto" for d_model / 16
            rounded up.
        dt_min: the step sizes at initialisation are log-uniform from dt_min to dt_max.
        dt_max: see dt_min.
        dt_init_floor: least step size at initialisation.
        dt_init: "random" or "constant" weights of dt_proj, of size dt_scale / sqrt(dt_rank).
        conv_bias: whether the convolution has a bias.
        bias: whether in_proj and out_proj have a bias.
        backend: backend of the scan, as in `projecta.selective_scan`.
        bidirectional: whether a second direction, with a convolution, projections and rates of its own (names
            ending in _b, as in Vim's checkpoints), reads the sequence from its end; the gated outputs of both
            are added. Source: Zhu et al., "Vision Mamba" (2024), section 3.3.
        mrss: bands of `projecta.mrss_scan`, for example `projecta.mrss.BANDS`. The channels are sorted at
            initialisation: the first band takes the largest steps.

    Raises:
        ValueError: an argument is out of range. BackendUnavailable: `backend` cannot run here.

    Examples:
        >>> import torch
        >>> block = MambaBlock(8)
        >>> x = torch.randn(1, 5, 8)
        >>> y, state = block(x[:, :4], return_state=True)
        >>> torch.allclose(block.step(x[:, 4], state), block(x)[:, 4], atol=1e-6)
        True
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        backend: str = "auto",
        bidirectional: bool = False,
        mrss: Bands | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check = Checker("MambaBlock")
        for name, size in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
            check.that(size >= 1, name, "be at least 1", size)
        check.that(0 < dt_min <= dt_max, "dt_min", f"lie in (0, dt_max] = (0, {dt_max}]", dt_min)
        check.one_of("dt_init", dt_init, ("random", "constant"))
        check_backend(check, backend)
        if mrss is not None:
            check_bands(check, mrss, int(expand * d_model), name="mrss")
            check.that(not bidirectional, "mrss", "be None if the block is bidirectional", mrss)
        self.backend, self.bidirectional, self.mrss = backend, bidirectional, mrss
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = int(expand * d_model)
        check.that(self.d_inner >= 1, "expand", "give at least one channel", expand)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        whole = isinstance(rank, int) and rank >= 1
        check.that(whole, "dt_rank", "be 'auto' or an integer above 0", repr(dt_rank))
        self.dt_rank = int(rank)
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **to)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **to
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **to)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **to)
        rates = torch.arange(1.0, d_state + 1, device=device).repeat(self.d_inner, 1)
        self.A_log = nn.Parameter(torch.log(rates))  # float32 in every model: small changes of a rate count
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        for kept in (self.A_log, self.D):
            kept._no_weight_decay = True  # type: ignore[attr-defined]  # the mark that trainers of Mamba read
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **to)

        with torch.no_grad():
            weight, bias_of_steps = draw_steps(
                self.d_inner, self.dt_rank, dt_min, dt_max, dt_init_floor, dt_init, dt_scale, device,
                ordered=mrss is not None,
            )  # fmt: skip
            self.dt_proj.weight.copy_(weight)
            self.dt_proj.bias.copy_(bias_of_steps)
            self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        if bidirectional:
            back = MambaBlock(
                d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor,
                conv_bias, bias, **to,
            )  # fmt: skip
            self.conv1d_b, self.x_proj_b, self.dt_proj_b = back.conv1d, back.x_proj, back.dt_proj
            self.A_b_log, self.D_b = back.A_log, back.D

    def takes_pieces(self) -> bool:
        """Whether a call takes a piece of a sequence: it is within `projecta.parallel.context`."""
        return parallel.context_of(self) is not None

    def initial_state(self, batch: int) -> State:
        """The state before the first token: zeros."""
        weight = self.conv1d.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(batch, self.d_inner, self.d_state, device=weight.device, dtype=wide)
        ssm: Tensor | MrssState = zeros
        if self.mrss is not None:
            cut = check_bands(Checker("MambaBlock"), self.mrss, self.d_inner, name="mrss")
            ssm = MrssState.start(zeros, len(cut))
        return State(weight.new_zeros(batch, self.d_inner, self.d_conv - 1), ssm)

    def _check_state(self, check: Checker, state: State, b: int, inputs: int) -> None:
        """Check shapes, at which kernels do not look."""
        check.shape("state.conv", state.conv, (b, self.d_inner, inputs), "(b, d_inner, d_conv - 1)")
        blocks = isinstance(state.ssm, MrssState)
        kind = type(state.ssm).__name__
        check.that(not blocks or self.mrss is not None, "state.ssm", "be a tensor", kind, error=TypeError)
        h = state.ssm.h if isinstance(state.ssm, MrssState) else state.ssm
        check.shape("state.ssm", h, (b, self.d_inner, self.d_state), "(b, d_inner, d_state)")

    def forward(
        self,
        hidden_states: Tensor,
        state: State | None = None,
        return_state: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """Map (b, l, d_model) to the same shape, starting from `state` if given; differentiable in both.

        cu_seqlens: int32 (s + 1), packs s sequences into one row (b = 1), as in `projecta.selective_scan`;
        the states are then (s, ...). Within `projecta.parallel.context` it is `parallel.split_packed`'s.

        With mrss and `return_state` or a state, tokens are scanned one after the other: slow.

        A bidirectional block has no state, and does not run within `projecta.parallel.context`.

        Returns the output, with `return_state` also the state after the last token. Within
        `projecta.parallel.context` the first rank takes `state`, and the last rank returns the last one.
        """
        check = Checker("MambaBlock")
        check.that(
            hidden_states.dim() == 3 and hidden_states.shape[2] == self.d_model,
            "hidden_states", f"have shape (b, l, d_model = {self.d_model})", tuple(hidden_states.shape),
        )  # fmt: skip
        check.that(cu_seqlens is None or self.mrss is None, "cu_seqlens", "be None with mrss", "a packed row")
        where = parallel.context_of(self)
        if self.bidirectional:
            one_way = state is None and not return_state and where is None
            check.that(one_way, "bidirectional", "be False for a state or a piece of a sequence", True)
            return run_both_ways(self, hidden_states, self.backend, cu_seqlens)
        if where is not None:
            check_piece(check, where, self.mrss, cu_seqlens)
            before = (None, None) if state is None else state
            output, *after = run_piece(
                self, hidden_states, where, self.backend, before, cu_seqlens, drop=not return_state
            )
            return (output, State(*after)) if return_state else output
        if state is not None:
            b = len(hidden_states) if cu_seqlens is None else len(cu_seqlens) - 1
            self._check_state(check, state, b, self.d_conv - 1)
        conv, ssm = (None, None) if state is None else state
        if self.mrss is not None and ssm is None and return_state:
            ssm = self.initial_state(len(hidden_states)).ssm
        output, *after = run(
            self, hidden_states, self.backend, conv, ssm, keep=return_state, bands=self.mrss,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return (output, State(*after)) if return_state else output

    def step(self, hidden_states: Tensor, state: State) -> Tensor:
        """Map one token (b, d_model) to (b, d_model), overwriting `state` with the state after it."""
        check = Checker("MambaBlock.step")
        check.that(not self.bidirectional, "bidirectional", "be False for a step", True)
        check.shape("hidden_states", hidden_states, (len(state.conv), self.d_model), "(b, d_model)")
        self._check_state(check, state, len(hidden_states), max(state.conv.shape[-1], self.d_conv - 1))
        blocks, kind = isinstance(state.ssm, MrssState), type(state.ssm).__name__
        check.that(
            blocks or self.mrss is None, "state.ssm", "be a MrssState with mrss", kind,
            "`initial_state` gives one.", TypeError,
        )  # fmt: skip
        if self.mrss is None and not torch.is_grad_enabled():
            module, weights = fused(self, hidden_states, self.backend)
            if module is not None:
                return module.step(hidden_states, weights, *state)
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        return self.out_proj(step_layer(self, x, state.conv, z, state.ssm, self.backend))
