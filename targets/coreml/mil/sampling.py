"""Sampling of images at coordinates: `resample`, `affine` and `crop_resize`. Positions are computed in float64."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from targets.coreml.mil.registry import operator

Padding: TypeAlias = Literal["constant", "border", "reflection", "symmetric"]
Mode: TypeAlias = Literal["bilinear", "nearest"]

# Position, in elements, of sample i of n in a box from a to b, by MIL's name of the sampling mode. DEFAULT and
# UNALIGN_CORNERS are defined only for whole images.
_INTERVALS = {
    "ALIGN_CORNERS": lambda a, b, i, n: a + i * (b - a) / (n - 1) if n > 1 else (a + b) / 2 + 0 * i,
    "STRICT_ALIGN_CORNERS": lambda a, b, i, n: a + i * (b - a) / (n - 1) if n > 1 else a + 0 * i,
    "OFFSET_CORNERS": lambda a, b, i, n: a + (i + 0.5) * (b - a) / n,
}


@operator("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    *,
    sampling_mode: Mode,
    padding_mode: Padding,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """Sample `x` (B, C, H1, W1) at `coordinates` (B, H2, W2, 2), x before y; returns (B, C, H2, W2)."""
    height, width = x.shape[-2:]
    columns, rows = (
        _elements(coordinates[..., axis].double(), size, coordinates_mode, align_corners)
        for axis, size in enumerate((width, height))
    )
    return _sampled(x, columns, rows, sampling_mode, padding_mode, padding_value)


@operator("affine")
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    *,
    output_height: int,
    output_width: int,
    sampling_mode: Mode,
    padding_mode: Padding,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """Sample at x' = a0 x + a1 y + a2, y' = b0 x + b1 y + b2, where x and y range from -1 to 1 over the output."""
    if coordinates_mode != "normalized_minus_one_to_one" or not align_corners:
        raise ValueError(
            f"coordinates_mode {coordinates_mode} with align_corners {align_corners}; MIL defines only "
            "normalized_minus_one_to_one with align_corners"
        )
    y, x_ = torch.meshgrid(*(_ends(size) for size in (output_height, output_width)), indexing="ij")
    matrix = transform_matrix.double().reshape(-1, 2, 3).expand(len(x), -1, -1)
    points = torch.stack((x_, y, torch.ones_like(y)), -1)  # (H2, W2, 3)
    coordinates = torch.einsum("hwk,bck->bhwc", points, matrix)
    sampled: Tensor = resample(
        x,
        coordinates,
        sampling_mode=sampling_mode,
        padding_mode=padding_mode,
        padding_value=padding_value,
        coordinates_mode=coordinates_mode,
        align_corners=True,
    )
    return sampled


@operator("crop_resize")
def crop_resize(
    x: Tensor,
    roi: Tensor | None,
    boxes: Tensor | None,
    box_indices: Tensor | None,
    *,
    target_height: int,
    target_width: int,
    normalized_coordinates: bool,
    spatial_scale: float,
    box_coordinate_mode: str,
    sampling_mode: str,
    pad_value: float | None = None,
) -> Tensor:
    """Crop boxes from images (B, C, H, W) and resize them.

    From iOS 17 on, returns (N, C, h, w), where box i is cropped from image `box_indices[i]`. Before iOS 17, returns
    (N, B, C, h, w), every box cropped from every image; or (N, 1, C, h, w) where boxes start with an image index.
    """
    if boxes is not None:
        corners, images = boxes.double(), torch.arange(len(boxes)) if box_indices is None else box_indices.long()
        leading: tuple[int, ...] = (len(corners),)
    else:
        assert roi is not None
        flat = roi.reshape(len(roi), -1).double()
        count = len(x) if flat.shape[1] == 4 else 1
        corners = flat[:, -4:].repeat_interleave(count, 0)
        images = flat[:, 0].long() if flat.shape[1] == 5 else torch.arange(len(x)).repeat(len(flat))
        leading = (len(flat), count)
    if images.numel() and not (int(images.min()) >= 0 and int(images.max()) < len(x)):
        raise IndexError(f"a box refers to image {int(images.max())} of {len(x)} images")
    top, left, bottom, right = _corners(corners, box_coordinate_mode)
    if normalized_coordinates:
        top, bottom = top * (x.shape[-2] - 1), bottom * (x.shape[-2] - 1)
        left, right = left * (x.shape[-1] - 1), right * (x.shape[-1] - 1)
    rows = _interval(top * spatial_scale, bottom * spatial_scale, target_height, sampling_mode)
    columns = _interval(left * spatial_scale, right * spatial_scale, target_width, sampling_mode)
    crops = _boxes(x[images], rows, columns, pad_value)
    return crops.reshape(*leading, *crops.shape[1:])


def _boxes(x: Tensor, rows: Tensor, columns: Tensor, pad_value: float | None) -> Tensor:
    """Sample (N, C, H, W) at rows (N, h) and columns (N, w); positions outside the image have the value `pad_value`."""
    inside = ((rows >= 0) & (rows <= x.shape[-2] - 1)).unsqueeze(2) & (
        (columns >= 0) & (columns <= x.shape[-1] - 1)
    ).unsqueeze(1)
    if pad_value is None and not inside.all():
        raise ValueError("a box extends beyond the image, which MIL defines from iOS 16 on")
    shape = rows.shape[0], rows.shape[1], columns.shape[1]
    crops = _sampled(x, columns.unsqueeze(1).expand(shape), rows.unsqueeze(2).expand(shape), "bilinear", "border", 0.0)
    return torch.where(inside.unsqueeze(1), crops, 0.0 if pad_value is None else pad_value)


def _corners(boxes: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return top, left, bottom and right of boxes (N, 4) in the coordinate order `mode`."""
    first, second, third, fourth = boxes.unbind(1)
    if mode.endswith("WIDTH_FIRST"):
        first, second, third, fourth = second, first, fourth, third
    if mode.startswith("CENTER_SIZE"):
        return first - third / 2, second - fourth / 2, first + third / 2, second + fourth / 2
    return first, second, third, fourth


def _interval(start: Tensor, end: Tensor, count: int, mode: str) -> Tensor:
    if mode not in _INTERVALS:
        raise ValueError(f"sampling_mode {mode} of a box: MIL defines it only for whole images")
    places = torch.arange(count, dtype=torch.float64)
    positions: Tensor = _INTERVALS[mode](start.unsqueeze(1), end.unsqueeze(1), places, count)
    return positions


def _ends(size: int) -> Tensor:
    """Return `size` evenly spaced values from -1 to 1."""
    return torch.linspace(-1, 1, size, dtype=torch.float64)


def _elements(coordinates: Tensor, size: int, mode: str, align_corners: bool) -> Tensor:
    """Convert coordinates along an axis to positions in elements; 0 is the centre of the first element."""
    if mode == "unnormalized":
        return coordinates
    share = (coordinates + 1) / 2 if mode == "normalized_minus_one_to_one" else coordinates
    return share * (size - 1) if align_corners else share * size - 0.5


def _sampled(x: Tensor, columns: Tensor, rows: Tensor, mode: Mode, padding: Padding, value: float) -> Tensor:
    """Sample (N, C, H, W) at columns and rows (N, h, w), by torch's grid_sample in float64."""
    height, width = x.shape[-2:]
    aligned = padding == "reflection"  # reflects about the centres of the first and last elements, not their edges
    grid = torch.stack([_unit(columns, width, aligned), _unit(rows, height, aligned)], -1)
    padding_mode = {"constant": "zeros", "symmetric": "reflection"}.get(padding, padding)
    shift = value if padding == "constant" else 0.0
    return (F.grid_sample(x.double() - shift, grid, mode, padding_mode, aligned) + shift).to(x.dtype)


def _unit(positions: Tensor, size: int, aligned: bool) -> Tensor:
    """Convert positions in elements to grid_sample's coordinates from -1 to 1."""
    if aligned:
        return positions / (size - 1) * 2 - 1 if size > 1 else torch.zeros_like(positions)
    return (2 * positions + 1) / size - 1
