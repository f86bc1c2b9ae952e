"""What transformers' own Mamba, FalconMamba and Jamba compute: `stock_models.py stock|compat FILE`.

Writes a dictionary of tensors. "compat" installs projecta's names first, which transformers then uses.
"""

import sys
import tempfile

import torch
import transformers

from projecta import compat

# the default range would leave the mixers less than rounding in the logits
SHAPE = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
JAMBA = {
    "num_attention_heads": 2, "num_key_value_heads": 2, "mamba_d_state": 4, "intermediate_size": 16,
    "attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "expert_layer_period": 2,
    "use_mamba_kernels": True,
}  # fmt: skip
CONFIGS = {
    "Mamba": SHAPE | {"state_size": 4},
    "FalconMamba": SHAPE | {"state_size": 4},
    "Jamba": SHAPE | JAMBA,
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def evaluated(model, ids):
    """Logits by every way into the model."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding on the left
    whole = model(ids, output_hidden_states=True)
    yield "logits", whole.logits
    yield from ((f"hidden {i}", t) for i, t in enumerate(whole.hidden_states))
    yield "as a tuple", model(ids, return_dict=False)[0]
    yield "padded", model(ids, attention_mask=mask).logits
    yield "embedded", model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    yield "one token", model(ids[:, :1]).logits
    yield "half", model.to(torch.bfloat16)(ids).logits.float()
    model.float()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    yield "loaded", loaded(ids).logits
    model.resize_token_embeddings(34)
    yield "resized", model(ids).logits[..., :30]


@torch.no_grad()
def generated(model, ids):
    """Tokens of each decoding method; sampling draws the same numbers each time."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {
        "greedy": {}, "beams": {"num_beams": 3}, "returned beams": {"num_beams": 3, "num_return_sequences": 2},
        "sampled": {"do_sample": True, "top_k": 5}, "sampled beams": {"do_sample": True, "num_beams": 2},
        "padded": {"attention_mask": mask}, "without a cache": {"use_cache": False},
    }  # fmt: skip
    shared = {
        "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids),
        "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    for name, words in options.items():
        torch.manual_seed(0)
        found = model.generate(ids, **(shared | words))
        yield name, found.sequences
        yield from ((f"{name} {i}", t.masked_fill(t.isinf(), 0.0)) for i, t in enumerate(found.scores))


def trained(model, ids):
    """The loss and every gradient, also with checkpoints."""
    for name in ("plain", "checkpointed"):
        if name == "checkpointed":
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        yield f"{name} loss", loss.detach()
        yield from (
            (f"{name} {n}", p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None
        )


def main(kind: str, path: str) -> None:
    if kind == "compat":
        compat.install()
    torch.manual_seed(0)
    found = {}
    for name, config in CONFIGS.items():
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))
        model.to(DEVICE).eval()
        ids = torch.randint(3, 30, (2, 7)).to(DEVICE)
        for part in (generated, trained, evaluated):
            found |= {f"{name} {part.__name__} {n}": t.detach().cpu() for n, t in part(model, ids)}
            model.eval()
    torch.save(found, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
