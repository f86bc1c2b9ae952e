"""Vision Mamba: an image tower of Mamba layers, as a model of transformers.

    t_0     = patches of the image, a class token among them, + position embeddings     (b, t, c)
    x, z    = in_proj(norm(t))                                                          (b, t, d) each
    y_k     = selective_scan(silu(conv_k(x)), ...) silu(z)        tokens in the order of direction k
    t'      = t + out_proj(sum of y_k / directions)

The directions share in_proj and out_proj, and each has the other weights of a Mamba layer for itself:

    1   along the rows
    2   along the rows, and back
    4   along the rows and back, along the columns and back

Source: Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space
Model" (2024), section 3 and algorithm 1; its second version has two directions, and a class token in the
middle. The four directions are those of Liu et al., "VMamba: Visual State Space Model" (2024), section 4.
`convert_vim` reads Vim's published weights.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel

from projecta._checks import Checker
from projecta.conv import causal_conv
from projecta.mamba.layer import as_wide, check_backend, draw_steps, runs_triton, select
from projecta.mrss import check_bands, mrss_scan
from projecta.scan import selective_scan
from projecta.vision_mamba.order import Order, ordered, restored

SIZES = {"tiny": 192, "small": 384, "base": 768}  # hidden_size of Vim-Ti, S and B, 24 layers each
CLASS_TOKENS = ("middle", "first", "none")
# The axis and the way of each direction.
DIRECTIONS = {
    1: (("rows", 1),),
    2: (("rows", 1), ("rows", -1)),
    4: (("rows", 1), ("rows", -1), ("columns", 1), ("columns", -1)),
}


class VisionMambaConfig(PreTrainedConfig):
    """The sizes of a Vision Mamba; the defaults are those of Vim-Ti.

    Args:
        hidden_size: width c. num_hidden_layers: layers. state_size: states per channel. conv_kernel: width of
            the convolution. expand: d / c. time_step_rank: rank of the step size's projection, "auto" for
            c / 16 rounded up.
        directions: 1, 2 or 4; see this module.
        class_token: where it stands among the patches, "middle" or "first"; "none": the output is their mean.
        image_size: height and width in pixels for which the position embeddings are made; a model takes other
            sizes, whose embeddings are interpolated.
        patch_size: height and width of a patch. num_channels: of the image.
        mrss: bands of `projecta.mrss_scan`, for example `projecta.mrss.BANDS`, or None.
        backend: backend of the scan, as in `projecta.selective_scan`.
        layer_norm_epsilon: of the RMS norms.
        time_step_min: the step sizes at initialisation are log-uniform from it to time_step_max.
        time_step_max: see time_step_min.
        initializer_range: standard deviation of embeddings and of the classifier.

    Examples:
        >>> VisionMambaConfig.of_size("small").hidden_size
        384
    """

    model_type = "vision_mamba"

    hidden_size: int = 192
    num_hidden_layers: int = 24
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | str = "auto"
    directions: int = 2
    class_token: str = "middle"
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    mrss: list | tuple | None = None
    backend: str = "auto"
    layer_norm_epsilon: float = 1e-5
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    initializer_range: float = 0.02

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> "VisionMambaConfig":
        """Vim's published sizes: "tiny", "small", "base"."""
        Checker("VisionMambaConfig").one_of("size", size, tuple(SIZES))
        return cls(**{"hidden_size": SIZES[size], **changes})


def check_config(config: VisionMambaConfig) -> None:
    check = Checker("VisionMambaConfig")
    check.one_of("directions", config.directions, tuple(DIRECTIONS))
    check.one_of("class_token", config.class_token, CLASS_TOKENS)
    check_backend(check, config.backend)
    for side, patch in zip(_pair(config.image_size), _pair(config.patch_size), strict=True):
        check.that(side % patch == 0, "image_size", f"be a multiple of the patch size, {patch}", side)
    if config.mrss is not None:
        check_bands(check, _bands(config), config.expand * config.hidden_size, name="mrss")


def _bands(config: VisionMambaConfig) -> tuple:
    return tuple((float(fraction), int(period)) for fraction, period in config.mrss or ())


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class Direction(nn.Module):
    """The weights of a Mamba layer that each direction has for itself."""

    def __init__(self, config: VisionMambaConfig):
        super().__init__()
        d, n = config.expand * config.hidden_size, config.state_size
        rank = config.time_step_rank
        rank = math.ceil(config.hidden_size / 16) if rank == "auto" else int(rank)
        self.conv1d = nn.Conv1d(d, d, config.conv_kernel, groups=d, padding=config.conv_kernel - 1)
        self.x_proj = nn.Linear(d, rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(rank, d)
        self.A_log = nn.Parameter(torch.empty(d, n))
        self.D = nn.Parameter(torch.empty(d))

    def convolve(self, x: Tensor, way: int, backend: str) -> Tensor:
        """silu(conv(x)) of x (b, d, t); against the tokens' order if `way` is -1."""
        plain = backend in ("reference", "vectorised")
        y: Any = causal_conv(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, reverse=way < 0,
            backend="reference" if plain else "auto",
        )  # fmt: skip
        return y

    def select(
        self, u: Tensor, factor: Tensor | None, time_last: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
        """delta (b, d, t) before its bias, the bias, B and C (b, n, t) of u (b, d, t).

        With a `factor` f (b, 1, t), a state forgets f times: h_t = exp(f s A) h_{t-1} + s B u. So the step is
        f s and its weight B / f; delta then is the step itself, without a bias.
        """
        if factor is None and not time_last:
            delta, bias, B, C = select(self, u.transpose(1, 2))
            return delta.transpose(1, 2), bias, B.transpose(1, 2), C.transpose(1, 2)
        n = self.A_log.shape[1]
        dt, B, C = _project(self.x_proj, u, time_last).tensor_split((-2 * n, -n), 1)
        if factor is None:  # the scan adds the bias, in float32
            return _map_rows(self.dt_proj.weight, dt), self.dt_proj.bias, B, C
        factor = F.pad(factor, (0, u.shape[2] - factor.shape[2]), value=1.0).to(dt.dtype)
        return F.softplus(_project(self.dt_proj, dt, time_last)) * factor, None, B / factor, C


class VisionMambaMixer(nn.Module):
    def __init__(self, config: VisionMambaConfig):
        super().__init__()
        d = config.expand * config.hidden_size
        self.ways, self.backend = DIRECTIONS[config.directions], config.backend
        self.bands = None if config.mrss is None else _bands(config)
        self.in_proj = nn.Linear(config.hidden_size, 2 * d, bias=False)
        self.directions = nn.ModuleList(Direction(config) for _ in self.ways)
        self.out_proj = nn.Linear(d, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, order: Order) -> Tensor:
        time_last, count = self._takes_time_last(hidden, order), hidden.shape[1]
        if time_last:  # the kernels read 8 steps at a time
            hidden = F.pad(hidden, (0, 0, 0, -count % 8))
        x, gate = _project(self.in_proj, hidden.transpose(1, 2), time_last).chunk(2, 1)
        if order.holders is not None:
            x = order.spread(x)
        if order.unmerge and order.whole:  # the gate is that of the tokens, not of their places
            total = order.pick(self._scan_all(x, None, order.whole, order.tokens, time_last))
            del x
            total = total * F.silu(gate)
        else:
            total = self._scan_all(x, gate, order, count, time_last)
        output = self.out_proj(total.transpose(1, 2))[:, :count]
        return output if len(self.ways) == 1 else output / len(self.ways)

    def _scan_all(self, x: Tensor, z: Tensor | None, order: Order, t: int, time_last: bool) -> Tensor:
        """The sum of y (b, d, t) of all directions."""
        ways = {way: [k for k, (_, own) in enumerate(self.ways) if own == way] for _, way in self.ways}
        each = [self._scan(x, z, order, way, chosen, t, time_last) for way, chosen in ways.items()]
        return each[0] if len(each) == 1 else each[0] + each[1]

    def steps(self, hidden: Tensor, order: Order) -> Tensor:
        """The step size of each token, mean over channels and directions (b, t)."""
        x, total = self.in_proj(hidden).transpose(1, 2).chunk(2, 1)[0], torch.zeros((), device=hidden.device)
        x = x if order.holders is None else order.spread(x)
        directions: Any = self.directions
        for direction, (axis, way) in zip(directions, self.ways, strict=True):
            u = self._convolve(direction, x, axis, way, order)
            delta, bias, _, _ = select(direction, u.transpose(1, 2))
            sizes = F.softplus(as_wide(delta) + as_wide(bias)).mean(-1)  # type: ignore[arg-type]
            total = total + restored(sizes[:, None], axis, order)[:, 0]
        return total / len(self.ways)

    def _convolve(self, direction: Any, x: Tensor, axis: str, way: int, order: Order) -> Tensor:
        """silu(conv(x)) of the tokens, in an axis's order; x (b, d, t) has all places if some are merged."""
        if order.holders is None or order.whole is None:
            return direction.convolve(ordered(x, axis, order), way, self.backend)
        u = direction.convolve(ordered(x, axis, order.whole), way, self.backend)
        return ordered(order.pick(restored(u, axis, order.whole)), axis, order)

    def _takes_time_last(self, hidden: Tensor, order: Order) -> bool:
        """Whether time is to be last in memory: where the GPU's kernels run, and all weights are plain.

        Channels stay last where tokens are gathered, along columns or from their holders, and with MRSS.
        """
        if hidden.dtype == torch.float64 or not runs_triton(hidden, self.backend):
            return False
        if (
            order.holders is not None
            or self.bands is not None
            or any(axis != "rows" for axis, _ in self.ways)
        ):
            return False
        directions: Any = self.directions
        parts = [self.in_proj, *(m for d in directions for m in (d.x_proj, d.dt_proj))]
        return all(
            type(m) is nn.Linear and not (m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m))
            for m in parts
        )

    def _scan(
        self, x: Tensor, z: Tensor | None, order: Order, way: int, chosen: list[int], t: int, time_last: bool
    ) -> Tensor:
        """The sum of y (b, d, t) of the directions of one way; all of them are groups of one call.

        x and z may have more steps than the t tokens; there a state stays zero.
        """
        parts: list[Any] = []
        for k in chosen:
            direction: Any = self.directions[k]
            axis = self.ways[k][0]
            u = self._convolve(direction, x, axis, way, order)
            if way < 0 and u.shape[2] > t:
                u[..., t:] = 0
            factor = order.factors.get((axis, way))
            delta, bias, B, C = direction.select(u, factor, time_last)
            A = -torch.exp(as_wide(direction.A_log))
            gate = None if z is None else ordered(z, axis, order)
            parts.append((u, delta, B, C, gate, A, direction.D, bias))
        softplus = factor is None
        if len(parts) > 1 and self.bands is None:
            y = self._run(way, softplus, *map(_together, zip(*parts, strict=True), _AXES))
            each = y.chunk(len(parts), 1)
        else:
            each = tuple(self._run(way, softplus, *part) for part in parts)
        found = [restored(y, self.ways[k][0], order) for y, k in zip(each, chosen, strict=True)]
        return found[0] if len(found) == 1 else found[0] + found[1]

    def _run(self, way: int, softplus: bool, u, delta, B, C, z, A, D, bias) -> Any:
        if self.bands is None:
            return selective_scan(
                u, delta, A, B, C, D, z, bias, softplus, reverse=way < 0, backend=self.backend
            )
        if way < 0:
            u, delta, B, C, z = (None if t is None else t.flip(-1) for t in (u, delta, B, C, z))
        y: Any = mrss_scan(u, delta, A, B, C, D, z, bias, softplus, bands=self.bands, backend=self.backend)
        return y.flip(-1) if way < 0 else y


def _project(linear: nn.Linear, t: Tensor, time_last: bool) -> Tensor:
    """linear over the channels of t (b, k, l), (b, m, l) with time or channels last in memory."""
    if time_last:
        return _map_rows(linear.weight, t, linear.bias)
    return linear(t.transpose(1, 2)).transpose(1, 2)


def _map_rows(weight: Tensor, t: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight t + bias, of t (b, k, l) with time last in memory, as the result is."""
    columns = t.transpose(0, 1).flatten(1)  # (k, b l)
    rows = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return rows.unflatten(1, (len(t), -1)).transpose(0, 1)


_AXES = (1, 1, None, None, 1, 0, 0, 0)  # of the channels in each argument; None: a group for each part


def _together(tensors: tuple, axis: int | None) -> Tensor | None:
    """One argument of several directions, whose channels follow each other."""
    if tensors[0] is None:
        return None
    if axis is None:
        return torch.stack(tensors, 1)
    return torch.cat(tensors, axis)


class VisionMambaLayer(GradientCheckpointingLayer):
    """A norm, a mixer and the residual. It returns the order of its tokens, too."""

    def __init__(self, config: VisionMambaConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = VisionMambaMixer(config)

    def forward(self, hidden_states: Tensor, order: Order, **_: Any) -> tuple[Tensor, Order]:
        return hidden_states + self.mixer(self.norm(hidden_states), order), order


class VisionMambaEmbeddings(nn.Module):
    """Patches, the class token among them, and position embeddings."""

    def __init__(self, config: VisionMambaConfig):
        super().__init__()
        self.patch_size, self.class_token = _pair(config.patch_size), config.class_token
        sides = zip(_pair(config.image_size), self.patch_size, strict=True)
        rows, columns = (side // patch for side, patch in sides)
        self.grid = rows, columns
        c = config.hidden_size
        self.projection = nn.Conv2d(config.num_channels, c, self.patch_size, self.patch_size)
        self.cls_token: Tensor | None
        own = None if self.class_token == "none" else nn.Parameter(torch.zeros(1, 1, c))
        self.register_parameter("cls_token", own)
        count = rows * columns + (self.cls_token is not None)
        self.position_embeddings: Tensor = nn.Parameter(torch.zeros(1, count, c))

    def class_at(self, grid: tuple[int, int]) -> int | None:
        return {"middle": grid[0] * grid[1] // 2, "first": 0, "none": None}[self.class_token]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embeddings of an image of so many rows and columns of patches."""
        known = self.position_embeddings
        if grid == self.grid:
            return known
        at, patches, own = self.class_at(self.grid), known, None
        if at is not None:
            own, patches = known[:, at : at + 1], torch.cat([known[:, :at], known[:, at + 1 :]], 1)
        patches = patches.transpose(1, 2).unflatten(2, self.grid).float()
        patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        patches = patches.flatten(2).transpose(1, 2).to(known.dtype)
        return patches if own is None else _insert(patches, own, self.class_at(grid))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Order]:
        check = Checker("VisionMambaModel")
        shape = tuple(pixel_values.shape)
        channels = self.projection.in_channels
        check.that(
            pixel_values.dim() == 4 and shape[1] == channels, "pixel_values",
            f"have shape (b, {channels}, height, width)", shape,
        )  # fmt: skip
        fits = all(side % patch == 0 for side, patch in zip(shape[2:], self.patch_size, strict=True))
        check.that(fits, "pixel_values", f"have sides that are multiples of {self.patch_size}", shape)
        found = self.projection(pixel_values.to(self.projection.weight.dtype))
        grid = tuple(found.shape[2:])
        tokens, at = found.flatten(2).transpose(1, 2), self.class_at(grid)
        if self.cls_token is not None:
            tokens = _insert(tokens, self.cls_token.expand(len(tokens), -1, -1), at)
        return tokens + self.positions(grid), Order(grid, at)


def _insert(tokens: Tensor, one: Tensor, at: int | None) -> Tensor:
    return torch.cat([tokens[:, :at], one, tokens[:, at:]], 1)


class VisionMambaPreTrainedModel(PreTrainedModel):
    config_class = VisionMambaConfig
    base_model_prefix = "vision_mamba"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionMambaEmbeddings", "VisionMambaLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["A_log"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        from transformers import initialization as init

        config: Any = self.config
        if isinstance(module, VisionMambaEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=config.initializer_range)
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=config.initializer_range)
        elif isinstance(module, Direction):
            d, n = module.A_log.shape
            init.copy_(module.A_log, torch.log(torch.arange(1.0, n + 1)).repeat(d, 1))
            init.ones_(module.D)
            rank, limits = module.dt_proj.in_features, (config.time_step_min, config.time_step_max)
            weight, bias = draw_steps(d, rank, *limits, ordered=config.mrss is not None)
            init.copy_(module.dt_proj.weight, weight)
            init.copy_(module.dt_proj.bias, bias)
        elif isinstance(module, VisionMambaForImageClassification):
            if isinstance(module.classifier, nn.Linear):
                init.normal_(module.classifier.weight, std=config.initializer_range)
                init.zeros_(module.classifier.bias)
        elif isinstance(module, VisionMambaMixer):
            init.kaiming_uniform_(module.in_proj.weight, a=math.sqrt(5))
            init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
            init.copy_(module.out_proj.weight, module.out_proj.weight / math.sqrt(config.num_hidden_layers))


class VisionMambaModel(VisionMambaPreTrainedModel):
    """The tower: last_hidden_state (b, t, c) and pooler_output (b, c), the class token or the mean.

    Examples:
        >>> config = VisionMambaConfig(hidden_size=32, num_hidden_layers=2, image_size=32, patch_size=8)
        >>> model = VisionMambaModel(config).eval()
        >>> model(torch.zeros(1, 3, 32, 32)).pooler_output.shape
        torch.Size([1, 32])
    """

    def __init__(self, config: VisionMambaConfig):
        check_config(config)
        super().__init__(config)
        self.embeddings = VisionMambaEmbeddings(config)
        self.layers = nn.ModuleList(VisionMambaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, **options: Any,
    ) -> BaseModelOutputWithPooling | tuple:  # fmt: skip
        """Features of images (b, channels, height, width), whose sides are multiples of the patch size."""
        tokens, order = self.embeddings(pixel_values)
        if any(axis == "columns" for axis, _ in DIRECTIONS[self.config.directions]):
            order = order.with_columns(tokens.device)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [tokens] if wanted else []
        for layer in self.layers:
            tokens, order = layer(tokens, order, **options)
            if wanted:
                states.append(tokens)
        tokens = self.norm(tokens)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=order.of_class(tokens),
            hidden_states=tuple(states) if wanted else None,
        )  # fmt: skip
        plain = self.config.return_dict if return_dict is None else return_dict
        return output if plain else output.to_tuple()


class VisionMambaForImageClassification(VisionMambaPreTrainedModel):
    """The tower and a linear classifier of its pooled output.

    With `labels`, class indices (b,), the loss is the mean cross-entropy.
    """

    accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the steps that it accumulates

    def __init__(self, config: VisionMambaConfig):
        check_config(config)
        super().__init__(config)
        self.vision_mamba = VisionMambaModel(config)
        kinds = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, kinds) if kinds else nn.Identity()
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None,
        **options: Any,
    ) -> ImageClassifierOutput | tuple:  # fmt: skip
        found = self.vision_mamba(pixel_values, return_dict=True, **options)
        logits = self.classifier(found.pooler_output)
        loss = None
        if labels is not None:
            Checker("VisionMambaForImageClassification").that(
                labels.dim() == 1 and not labels.is_floating_point(), "labels", "be class indices (b,)",
                f"{labels.dtype} {tuple(labels.shape)}",
            )  # fmt: skip
            loss = F.cross_entropy(logits.float(), labels)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)
        plain = self.config.return_dict if return_dict is None else return_dict
        return output if plain else output.to_tuple()


_VIM = (  # parts of names in Vim's checkpoints, and here
    ("patch_embed.proj.", "embeddings.projection."), ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"), ("norm_f.", "norm."), ("head.", "classifier."),
    ("mixer.A_b_log", "mixer.directions.1.A_log"), ("mixer.D_b", "mixer.directions.1.D"),
    *((f"mixer.{part}_b.", f"mixer.directions.1.{part}.") for part in ("conv1d", "x_proj", "dt_proj")),
    ("mixer.A_log", "mixer.directions.0.A_log"), ("mixer.D", "mixer.directions.0.D"),
    *((f"mixer.{part}.", f"mixer.directions.0.{part}.") for part in ("conv1d", "x_proj", "dt_proj")),
)  # fmt: skip


def convert_vim(weights: Mapping[str, Tensor], **changes: Any) -> VisionMambaForImageClassification:
    """A model from the weights of a published Vim, version 2: `torch.load(path)["model"]`.

    Args:
        weights: by name, as Vim saves them. changes: fields of the config that weights do not show.

    Raises:
        ValueError: names are missing or unknown. RuntimeError: a shape does not fit; give `image_size` if the
            images are not square.
    """
    check, parts = Checker("convert_vim"), ("A_log", "conv1d.weight", "dt_proj.weight")
    read = "patch_embed.proj.weight", "pos_embed", *(f"layers.0.mixer.{part}" for part in parts)
    known = all(name in weights for name in read)
    check.that(known, "weights", "be those of a Vim", sorted(weights)[:3])
    named: dict[str, Tensor] = {}
    for name, t in weights.items():
        new = name
        for theirs, ours in _VIM:
            if theirs in new:
                new = new.replace(theirs, ours)
                break
        named[new if new.startswith("classifier.") else f"vision_mamba.{new}"] = t
    patch = weights["patch_embed.proj.weight"]
    sides, tokens = tuple(patch.shape[2:]), weights["pos_embed"].shape[1] - 1
    d, n = weights["layers.0.mixer.A_log"].shape
    side = math.isqrt(tokens)
    config = VisionMambaConfig(**{
        "hidden_size": patch.shape[0], "num_channels": patch.shape[1], "patch_size": sides,
        "image_size": (side * sides[0], side * sides[1]), "expand": d // patch.shape[0], "state_size": n,
        "num_hidden_layers": len({name.split(".")[1] for name in weights if name.startswith("layers.")}),
        "conv_kernel": weights["layers.0.mixer.conv1d.weight"].shape[-1],
        "time_step_rank": weights["layers.0.mixer.dt_proj.weight"].shape[1],
        "directions": 2 if "layers.0.mixer.A_b_log" in weights else 1,
        "num_labels": len(weights["head.bias"]) if "head.bias" in weights else 0, **changes,
    })  # fmt: skip
    model = VisionMambaForImageClassification(config)
    found = model.load_state_dict(named, strict=False)
    check.that(not found.missing_keys, "weights", "have every name", found.missing_keys[:3])
    check.that(not found.unexpected_keys, "weights", "have no other names", found.unexpected_keys[:3])
    return model.eval()


AutoConfig.register("vision_mamba", VisionMambaConfig, exist_ok=True)
AutoModel.register(VisionMambaConfig, VisionMambaModel, exist_ok=True)
AutoModelForImageClassification.register(VisionMambaConfig, VisionMambaForImageClassification, exist_ok=True)
