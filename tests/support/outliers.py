"""Channels of very different range in a trained network, as in published checkpoints, with unchanged outputs: a channel
is multiplied by a factor where it is produced, and divided by it wherever it is read.

Written for the modules of each family, deliberately without
`calibration.ptq.equalization.channel_scales`, which it tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from models import (
    _layers,
    _pyramid,
    acmix,
    coatnet,
    conformer,
    convmixer,
    hatnet,
    mobilenetv2,
    mobilevit,
    swin,
    transcnn,
)

OCTAVES: Final = 6.0  # factors are between 2**-OCTAVES and 2**OCTAVES

_NORMS: Final = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Channels of `module` from `start` on; `inverse`: they are multiplied by the inverse of the factor."""

    module: nn.Module
    start: int = 0
    inverse: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescaling:
    """`count` channels that all sides in `made` produce and all sides in `read` read."""

    count: int
    made: Sequence[Side]
    read: Sequence[Side]


def spread(network: nn.Module, seed: int, octaves: float = OCTAVES) -> int:
    """Multiply channels of `network` in place by factors of up to 2**`octaves` and inverses; return their number."""
    generator = torch.Generator().manual_seed(seed)
    total = 0
    with torch.no_grad():
        for rescaling in rescalings(network):
            total += rescaling.count
            factors = 2.0 ** ((2 * torch.rand(rescaling.count, generator=generator) - 1) * octaves)
            for side in rescaling.made:
                _make(side, 1 / factors if side.inverse else factors)
            for side in rescaling.read:
                _read(side, factors)
    return total


def rescalings(network: nn.Module) -> Iterator[Rescaling]:
    """Yield the rescalings of the network and of its parts, by class."""
    for module in network.modules():
        for kind, found in _FOUND.items():
            if type(module) is kind:
                yield from found(module)


def _make(side: Side, factors: Tensor) -> None:
    rows = slice(side.start, side.start + len(factors))
    for values in (side.module.weight, side.module.bias):
        if isinstance(values, Tensor):
            values[rows] *= factors.reshape(-1, *(1,) * (values.ndim - 1))


def _read(side: Side, factors: Tensor) -> None:
    module, columns = side.module, slice(side.start, side.start + len(factors))
    assert isinstance(module.weight, Tensor)
    if isinstance(module, nn.BatchNorm2d):  # (x - mean) * weight: the variance stays, and with it its epsilon
        assert module.running_mean is not None
        module.running_mean[columns] *= factors
        module.weight[columns] /= factors
    elif isinstance(module, nn.Conv2d) and module.groups > 1:
        assert module.groups == len(factors) == module.in_channels
        module.weight /= factors.reshape(-1, 1, 1, 1)
    else:
        module.weight[:, columns] /= factors.reshape(-1, *(1,) * (module.weight.ndim - 2))


def _from(*modules: nn.Module) -> list[Side]:
    return [Side(module=module) for module in modules]


def _between(made: Iterable[nn.Module], read: Iterable[nn.Module]) -> Rescaling:
    """Return the rescaling of all channels of the first module in `made`."""
    made = list(made)
    weight = made[0].weight
    assert isinstance(weight, Tensor)
    return Rescaling(count=len(weight), made=_from(*made), read=_from(*read))


def _queries(
    projections: nn.Module, dim: int, starts: tuple[int, int] = (0, 0), keys: nn.Module | None = None
) -> Rescaling:
    """Return the rescaling of queries by the factor and of keys by its inverse."""
    query = Side(module=projections, start=starts[0])
    key = Side(module=keys or projections, start=starts[1], inverse=True)
    return Rescaling(count=dim, made=[query, key], read=[])


def _values(projections: nn.Module, dim: int, start: int, reader: nn.Module, column: int = 0) -> Rescaling:
    return Rescaling(count=dim, made=[Side(module=projections, start=start)], read=[Side(module=reader, start=column)])


def _attention(part: Any) -> Iterator[Rescaling]:
    """Yield the rescalings of queries, keys and values that are rows of one layer."""
    dim = part.proj.weight.shape[1]
    yield _queries(part.qkv, dim, (0, dim))
    yield _values(part.qkv, dim, 2 * dim, part.proj)


def _pre_norm(part: Any) -> Iterator[Rescaling]:
    yield _between([part.norm1], [part.attn.qkv])
    yield _between([part.norm2], [part.mlp.fc1])


def _mobilevit(part: Any) -> Iterator[Rescaling]:
    """Yield the rescalings of maps that inverted residuals pass on without an activation."""
    made: list[nn.Module] = []
    read: list[nn.Module] = []
    for block in (block for stage in part.stages for block in stage):
        if isinstance(block, mobilevit.MobileViTBlock):
            yield _between(made, [*read, block.conv_kxk.conv, block.conv_fusion.conv])
            made, read = [], []
            continue
        read.append(block.conv1_1x1.conv)
        if not block.skip:
            if made:
                yield _between(made, read)
            made, read = [block.conv3_1x1.bn], []
        elif made:
            made.append(block.conv3_1x1.bn)
        else:  # the input comes from an activation
            read = []


def _mobilevit_block(part: Any) -> Iterator[Rescaling]:
    yield _between([part.norm], [part.conv_proj.conv])


def _mobilenetv2(part: Any) -> Iterator[Rescaling]:
    made: list[nn.Module] = []
    read: list[nn.Module] = []
    for block in (block for stage in part.blocks for block in stage):
        if isinstance(block, mobilenetv2.InvertedResidual):
            read.append(block.conv_pw)
            if not block.skip:
                yield _between(made, read)
                made, read = [], []
            made.append(block.bn3)
        else:
            made.append(block.bn2)
    yield _between(made, [*read, part.conv_head])


def _convmixer(part: Any) -> Iterator[Rescaling]:
    conv, _, norm = part.stem
    yield _between([conv], [norm])  # across ReLU
    for residual, pointwise, _, last in part.blocks:
        depthwise, _, inner = residual.fn
        yield _between([norm, inner], [depthwise, pointwise])
        yield _between([depthwise], [inner])
        yield _between([pointwise], [last])
        norm = last
    yield _between([norm], [part.head])


def _coatnet(part: Any) -> Iterator[Rescaling]:
    yield _between([part.norm], [part.head.fc])


def _coatnet_residual(part: Any) -> Iterator[Rescaling]:
    yield _between([part.pre_norm], [part.conv1_1x1])


def _coatnet_block(part: Any) -> Iterator[Rescaling]:
    yield _between([getattr(part.norm1, "norm", part.norm1)], [part.attn.qkv])
    yield _between([part.norm2], [part.mlp.fc1])


def _coatnet_attention(part: Any) -> Iterator[Rescaling]:
    """Yield the rescalings of queries, keys and values of each head."""
    dim = part.dim // part.heads
    for head in range(part.heads):
        yield _queries(part.qkv, dim, (3 * head * dim, (3 * head + 1) * dim))
        yield _values(part.qkv, dim, (3 * head + 2) * dim, part.proj, head * dim)


def _conformer(part: Any) -> Iterator[Rescaling]:
    yield _between([part.bn1], [part.conv_1.conv1, part.conv_1.residual_conv, part.trans_patch_conv])
    blocks: list[tuple[Any, list[nn.Module], list[nn.Module]]] = [(part.conv_1, [], [])]
    for block in part.conv_trans.values():
        blocks.append((block.cnn_block, [], [block.squeeze_block.conv_project]))
        blocks.append((block.fusion_block, [block.expand_block.bn], []))
    made: list[nn.Module] = []
    read: list[nn.Module] = []
    for block, found, readers in blocks:
        yield _between([block.bn1, *found], [block.conv2])
        yield _between([block.bn2], [block.conv3, *readers])
        read.append(block.conv1)
        if isinstance(block.residual_conv, nn.Conv2d):  # a new stream of maps
            if made:
                yield _between(made, [*read, block.residual_conv])
            made, read = [block.residual_bn], []
        made.append(block.bn3)
    yield _between(made, [*read, part.conv_cls_head])
    yield _between([part.trans_norm], [part.trans_cls_head])


def _transcnn(part: Any) -> Iterator[Rescaling]:
    """Yield the rescalings of the first stage's maps, which have no activation."""
    made = _from(part.patch_embed[3])
    read = _from(part.ds2.conv, part.ds2.residual)
    dim = len(part.patch_embed[3].weight)
    for block in part.blocks[0]:
        made += [*_from(block.attn.proj, block.conv.conv3[1]), Side(module=block.attn.qkv, start=2 * dim)]
        read += _from(block.attn.norm, block.attn.grid_norm, block.conv.conv1[0])
    yield Rescaling(count=dim, made=made, read=read)


def _pyramid_attention(part: Any) -> Iterator[Rescaling]:
    dim = len(part.norm.weight)
    yield _between([part.norm], [part.qkv])
    if part.grid == 1:
        yield from _attention(part)
        return
    yield _queries(part.qkv, dim, (0, dim))
    yield _queries(part.q, dim, keys=part.kv)
    yield _between([part.ds_norm], [part.kv])
    if isinstance(part.ds_norm, nn.BatchNorm2d):
        made = [*_from(part.grid_norm), Side(module=part.kv, start=dim)]
        yield Rescaling(count=dim, made=made, read=_from(part.q, part.ds_norm, part.proj))


def _hatnet_residual(part: Any) -> Iterator[Rescaling]:
    yield _between([part.conv1[0]], [part.conv1[1]])


def _swin(part: Any) -> Iterator[Rescaling]:
    yield _between([part.norm], [part.head.fc])


def _merging(part: Any) -> Iterator[Rescaling]:
    yield _between([part.norm], [part.reduction])


def _acmix(part: Any) -> Iterator[Rescaling]:
    made: list[nn.Module] = [part.bn1]
    read: list[nn.Module] = []
    for block in (module for module in part.modules() if isinstance(module, acmix.Bottleneck)):
        mixing = block.conv2
        yield _between([block.bn1], [mixing.conv1, mixing.conv2, mixing.conv3])
        yield _between([block.bn2], [block.conv3])
        read.append(block.conv1)
        if isinstance(block.downsample, nn.Sequential):
            yield _between(made, [*read, block.downsample[0]])
            made, read = [block.downsample[1]], []
        made.append(block.bn3)
    yield _between(made, [*read, part.fc])


_Found: TypeAlias = Callable[..., Iterator[Rescaling]]
_FOUND: Final[Mapping[type[nn.Module], _Found]] = {
    _layers.Attention: _attention,
    mobilevit.TransformerLayer: _pre_norm,
    mobilevit.MobileViT: _mobilevit,
    mobilevit.MobileViTBlock: _mobilevit_block,
    mobilenetv2.MobileNetV2: _mobilenetv2,
    convmixer.ConvMixer: _convmixer,
    coatnet.CoAtNet: _coatnet,
    coatnet.InvertedResidual: _coatnet_residual,
    coatnet.TransformerBlock: _coatnet_block,
    coatnet.Attention: _coatnet_attention,
    conformer.Conformer: _conformer,
    conformer.TransformerBlock: _pre_norm,
    transcnn.TransCNN: _transcnn,
    _pyramid.Attention: _pyramid_attention,
    hatnet.Attention: _pyramid_attention,
    hatnet.InvertedResidual: _hatnet_residual,
    swin.Swin: _swin,
    swin.Block: _pre_norm,
    swin.PatchMerging: _merging,
    swin.WindowAttention: _attention,
    acmix.ACmixResNet: _acmix,
}
