"""mamba-ssm's language model: `MambaConfig`, `Block`, `MixerModel`, `MambaLMHeadModel`."""

import dataclasses
import json
import math
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projecta._checks import Checker
from projecta.compat.generation import GenerationMixin, load_config_hf, load_state_dict_hf
from projecta.compat.mamba import Mamba
from projecta.compat.norm import RMSNorm, layer_norm_fn


@dataclasses.dataclass
class MambaConfig:
    """The shape of a model. ssm_cfg: arguments of `Mamba`."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = dataclasses.field(default_factory=dict)
    attn_layer_idx: list = dataclasses.field(default_factory=list)
    attn_cfg: dict = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class GatedMLP(nn.Module):
    """W_2 (x silu(gate)), x and gate the halves of W_1 h."""

    def __init__(
        self, in_features: int, hidden_features: int | None = None, out_features: int | None = None,
        activation: Callable = F.silu, bias: bool = False, multiple_of: int = 128, device: Any = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.activation = activation
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(
            hidden,
            in_features if out_features is None else out_features,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(y * self.activation(gate))


class Block(nn.Module):
    """Add the residual, norm, mix: returns the mixer's output and the sum, for the next block.

    Args:
        dim: width. mixer_cls: makes the mixer of a width. mlp_cls: makes an MLP; `nn.Identity` for none.
        norm_cls: makes a norm. fused_add_norm: add and norm in one call.
        residual_in_fp32: keep the sum in float32.
    """

    def __init__(
        self, dim: int, mixer_cls: Callable, mlp_cls: Any = nn.Identity, norm_cls: Callable = nn.LayerNorm,
        fused_add_norm: bool = False, residual_in_fp32: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer, self.mlp = norm_cls(dim), mixer_cls(dim), None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        hidden_states, residual = self._add_and_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **options)
        if self.mlp is not None:
            hidden_states, residual = self._add_and_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_and_norm(self, norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            return layer_norm_fn(
                hidden, norm.weight, norm.bias, residual=residual, eps=norm.eps, prenorm=True,
                residual_in_fp32=self.residual_in_fp32, is_rms_norm=isinstance(norm, RMSNorm),
            )  # fmt: skip
        total = hidden if residual is None else hidden + residual
        normed = norm(total.to(norm.weight.dtype))
        return normed, total.float() if self.residual_in_fp32 else total

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Any:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)


def create_block(
    d_model: int, d_intermediate: int = 0, ssm_cfg: dict | None = None, attn_layer_idx: list | None = None,
    attn_cfg: dict | None = None, norm_epsilon: float = 1e-5, rms_norm: bool = False,
    residual_in_fp32: bool = False, fused_add_norm: bool = False, layer_idx: int | None = None,
    device: Any = None, dtype: torch.dtype | None = None,
) -> Block:  # fmt: skip
    """A `Block` with a `Mamba` mixer."""
    check, options = Checker("create_block"), dict(ssm_cfg or {})
    layer = options.pop("layer", "Mamba1")
    check.that(layer == "Mamba1", "ssm_cfg", "have layer 'Mamba1': Mamba-2 is out of scope", layer)
    check.that(
        not attn_layer_idx, "attn_layer_idx", "be empty: attention is not a part of Mamba-1", attn_layer_idx
    )
    to: dict[str, Any] = {"device": device, "dtype": dtype}
    mlp = nn.Identity if d_intermediate == 0 else partial(GatedMLP, hidden_features=d_intermediate, **to)
    block = Block(
        d_model, partial(Mamba, layer_idx=layer_idx, **options, **to), mlp,
        partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **to), fused_add_norm,
        residual_in_fp32,
    )  # fmt: skip
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


class MixerModel(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(
        self, d_model: int, n_layer: int, d_intermediate: int, vocab_size: int, ssm_cfg: dict | None = None,
        attn_layer_idx: list | None = None, attn_cfg: dict | None = None, norm_epsilon: float = 1e-5,
        rms_norm: bool = False, initializer_cfg: dict | None = None, fused_add_norm: bool = False,
        residual_in_fp32: bool = False, device: Any = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **to)
        self.layers = nn.ModuleList(
            create_block(
                d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm,
                residual_in_fp32, fused_add_norm, i, **to,
            )
            for i in range(n_layer)
        )  # fmt: skip
        self.norm_f: Any = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **to)
        initialise(self, n_layer, 2 if d_intermediate else 1, **(initializer_cfg or {}))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict[int, Any]:
        blocks: Any = self.layers
        return {i: b.allocate_inference_cache(batch_size, max_seqlen, dtype) for i, b in enumerate(blocks)}

    def forward(self, input_ids: Tensor, inference_params: Any = None, **options: Any) -> Tensor:
        hidden, residual = self.embedding(input_ids), None
        for block in self.layers:
            hidden, residual = block(hidden, residual, inference_params=inference_params, **options)
        if self.fused_add_norm:
            return layer_norm_fn(
                hidden, self.norm_f.weight, self.norm_f.bias, residual=residual, eps=self.norm_f.eps,
                is_rms_norm=isinstance(self.norm_f, RMSNorm),
            )  # fmt: skip
        total = hidden if residual is None else hidden + residual
        return self.norm_f(total.to(self.norm_f.weight.dtype))


def initialise(
    model: nn.Module, n_layer: int, per_layer: int = 1, initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
) -> None:  # fmt: skip
    """Normal embeddings, zero biases, and out_proj smaller by the square root of the number of residual adds.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=initializer_range)
        elif isinstance(module, nn.Linear):
            if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
                nn.init.zeros_(module.bias)
            if rescale_prenorm_residual and name.rpartition(".")[2] in ("out_proj", "fc2"):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.weight /= math.sqrt(per_layer * n_layer)


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model; `generate` as in `GenerationMixin`."""

    def __init__(
        self, config: MambaConfig, initializer_cfg: dict | None = None, device: Any = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocabulary = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, vocabulary, config.ssm_cfg,
            config.attn_layer_idx, config.attn_cfg, rms_norm=config.rms_norm, initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm, residual_in_fp32=config.residual_in_fp32, device=device,
            dtype=dtype,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocabulary, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict:
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype)

    def forward(
        self, input_ids: Tensor, position_ids: Any = None, inference_params: Any = None,
        num_last_tokens: int = 0,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Logits (b, l, vocabulary), as `.logits`; of the last `num_last_tokens` if above 0."""
        hidden = self.backbone(input_ids, inference_params=inference_params, **options)
        if num_last_tokens > 0:
            hidden = hidden[:, -num_last_tokens:]
        return namedtuple("CausalLMOutput", ["logits"])(self.lm_head(hidden))  # type: ignore[call-arg]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str, device: Any = None, dtype: torch.dtype | None = None, **options: Any
    ) -> "MambaLMHeadModel":
        """Load config.json and the weights of a local folder, or of a model on the Hugging Face Hub."""
        model = cls(
            MambaConfig(**load_config_hf(pretrained_model_name)), device=device, dtype=dtype, **options
        )
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype))
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Write config.json and pytorch_model.bin to a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        text = json.dumps(dataclasses.asdict(self.config), indent=4)
        (folder / "config.json").write_text(text, encoding="utf-8")
