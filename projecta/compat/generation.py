"""mamba-ssm's generation: `InferenceParams`, `decode`, `GenerationMixin`. Sampling is transformers'."""

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from projecta._checks import Checker


@dataclasses.dataclass
class InferenceParams:
    """The states of a model between calls; seqlen_offset: tokens that were read before."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = dataclasses.field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@torch.inference_mode()
def decode(
    input_ids: Tensor, model: Any, max_length: int, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0,
    temperature: float = 1.0, repetition_penalty: float = 1.0, eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None, vocab_size: int | None = None, cg: bool = False,
    enable_timing: bool = False, output_scores: bool = False, streamer: Any = None,
) -> SimpleNamespace:  # fmt: skip
    """Extend input_ids (b, l) to at most `max_length` tokens.

    Args:
        top_k: 1 is greedy, and temperature, top_p and min_p then change nothing; 0 keeps all.
        top_p, min_p: 0 keeps all. temperature: above 0.
        repetition_penalty: above 1 makes the tokens so far less likely.
        eos_token_id: generation ends where all rows have just given it.
        teacher_outputs: (b, at most max_length): tokens that are taken instead of the model's.
        vocab_size: logits beyond it are dropped.
        cg: capture the step in a CUDA graph; the model is on a GPU.
        enable_timing: print the seconds for prompt and decoding.
        output_scores: also return the logits that tokens were chosen from.
        streamer: as transformers' `TextStreamer`.

    Returns:
        sequences (b, l), and scores, a tuple of (b, vocabulary), or ().
    """
    check = Checker("decode")
    check.that(temperature > 0, "temperature", "be above 0", temperature)
    check.that(
        not cg or input_ids.is_cuda, "cg", "be False on a device other than a GPU", input_ids.device.type
    )
    choose = _chooser(top_k, top_p, min_p, temperature, repetition_penalty)
    b, prompt = input_ids.shape
    state = InferenceParams(max_seqlen=max_length, max_batch_size=b)
    state.key_value_memory_dict = model.allocate_inference_cache(b, max_length)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    step, begun, scores, sequences = None, time.perf_counter(), [], input_ids

    def one(token: Tensor) -> Tensor:
        return model(token, inference_params=state, num_last_tokens=1).logits[:, -1]

    logits = one(input_ids)
    while sequences.shape[1] < max_length:
        logits = logits[:, :vocab_size] if vocab_size is not None else logits
        if output_scores:
            scores.append(logits.clone())
        at = sequences.shape[1]
        if teacher_outputs is not None and at < teacher_outputs.shape[1]:
            token = teacher_outputs[:, at]
        else:
            token = choose(sequences, logits)
        sequences = torch.cat([sequences, token[:, None]], 1)
        state.seqlen_offset = at
        if streamer is not None:
            streamer.put(token.cpu())
        if eos_token_id is not None and bool((token == eos_token_id).all()):
            break
        if sequences.shape[1] < max_length:
            if cg:
                step = step or _Captured(one, token[:, None], state)
                logits = step(token[:, None])
            else:
                logits = one(token[:, None])
    if streamer is not None:
        streamer.end()
    if enable_timing:
        seconds, new = time.perf_counter() - begun, sequences.shape[1] - prompt
        print(f"Prompt of {prompt} and {new} new tokens: {seconds:.3f} s")
    return SimpleNamespace(sequences=sequences, scores=tuple(scores))


class _Captured:
    """A decoding step as a CUDA graph: what is learnt of the states while capturing is undone."""

    def __init__(self, step: Any, token: Tensor, state: InferenceParams):
        self.token = token.clone()
        states = [t for pair in state.key_value_memory_dict.values() for t in pair]
        before = [t.clone() for t in states]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(self.token)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(self.token)
        for t, old in zip(states, before, strict=True):
            t.copy_(old)

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        self.graph.replay()
        return self.logits


def _chooser(top_k: int, top_p: float, min_p: float, temperature: float, penalty: float) -> Any:
    """choose(sequences, logits): the next tokens (b,)."""
    from transformers import generation as g

    processors = g.LogitsProcessorList()
    if penalty != 1.0:
        processors.append(g.RepetitionPenaltyLogitsProcessor(penalty))
    if top_k != 1:
        if temperature != 1.0:
            processors.append(g.TemperatureLogitsWarper(temperature))
        if top_k > 0:
            processors.append(g.TopKLogitsWarper(top_k))
        if 0.0 < top_p < 1.0:
            processors.append(g.TopPLogitsWarper(top_p))
        if min_p > 0.0:
            processors.append(g.MinPLogitsWarper(min_p))

    def choose(sequences: Tensor, logits: Tensor) -> Tensor:
        scores = processors(sequences, logits.float())  # type: ignore[arg-type]
        if top_k == 1:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]

    return choose


class GenerationMixin:
    """`generate` for a model with `allocate_inference_cache`."""

    def generate(
        self, input_ids: Tensor, max_length: int, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0,
        temperature: float = 1.0, return_dict_in_generate: bool = False, output_scores: bool = False,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Sequences (b, l), with `return_dict_in_generate` as `.sequences` beside `.scores`; see `decode`."""
        found = decode(
            input_ids,
            self,
            max_length,
            top_k,
            top_p,
            min_p,
            temperature,
            output_scores=output_scores,
            **options,
        )
        return found if return_dict_in_generate else found.sequences


def load_config_hf(model_name: str) -> dict[str, Any]:
    """config.json of a local folder, or of a model on the Hugging Face Hub."""
    return json.loads(Path(_file(model_name, "config.json")).read_text(encoding="utf-8"))


def load_state_dict_hf(
    model_name: str, device: Any = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The weights of a local folder, or of a model on the Hugging Face Hub."""
    weights = torch.load(_file(model_name, "pytorch_model.bin"), map_location="cpu", weights_only=True)
    return {name: t.to(device=device, dtype=dtype) for name, t in weights.items()}


def _file(model_name: str, name: str) -> str:
    from transformers.utils import cached_file

    return cached_file(model_name, name)  # type: ignore[return-value]
