"""MIL sampling at coordinates: compared with torch's samplers, and with Apple's values for cropped boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.errors import CheckFailed
from targets.coreml import package as coreml_package
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.mil.evaluator import Evaluator
from tests.support.mil_programs import Opset, computed, saved

IMAGE = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
GRID = torch.rand(2, 4, 6, 2, generator=torch.Generator().manual_seed(1)) * 3 - 1.5  # beyond the edges, too
SQUARE = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_resample_matches_the_conversion_of_grid_sample(mode: str, padding: str, aligned: bool, tmp_path: Path) -> None:
    coremltools = import_coremltools()

    class Sampler(torch.nn.Module):
        def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
            return F.grid_sample(x, grid, mode, padding, aligned)

    program = torch.export.export(Sampler(), (IMAGE, GRID)).run_decompositions({})
    coremltools.convert(
        program,
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT32,
        skip_model_load=True,
        package_dir=str(tmp_path / "model.mlpackage"),
    )
    package = coreml_package.read(tmp_path / "model.mlpackage")
    assert package.named("resample")
    (found,) = Evaluator(package.operations, package.outputs).run({"x": IMAGE, "grid": GRID}).values()
    torch.testing.assert_close(found, F.grid_sample(IMAGE, GRID, mode, padding, aligned), atol=2e-5, rtol=1e-5)


def sampled(mode: str, coordinates_mode: str, points: list[tuple[float, float]], **given: Any) -> list[float]:
    grid = np.array(points, np.float32).reshape(1, 1, -1, 2)
    arguments: dict[str, Any] = {
        "sampling_mode": mode,
        "padding_mode": "constant",
        "padding_value": np.float32(9),
    } | given

    def body(mb: Any, x: Any, coordinates: Any) -> Any:
        return mb.resample(
            x=x, coordinates=coordinates, coordinates_mode=coordinates_mode, **{"align_corners": True} | arguments
        )

    found: list[float] = computed(body, SQUARE, grid)[0].ravel().tolist()
    return found


def test_coordinates_are_columns_before_rows_in_three_units() -> None:
    assert sampled("bilinear", "unnormalized", [(0, 0), (3, 0), (0, 3), (1.5, 0)]) == [1, 4, 13, 2.5]
    assert sampled("bilinear", "normalized_zero_to_one", [(0, 0), (1, 0), (0, 1), (0.5, 0)]) == [1, 4, 13, 2.5]
    assert sampled("bilinear", "normalized_zero_to_one", [(0.125, 0.125)], align_corners=False) == [1]
    assert sampled("nearest", "unnormalized", [(0.4, 0), (0.6, 0)]) == [1, 2]


def test_padding_is_a_constant_or_made_of_the_image() -> None:
    outside = [(-1.0, 0.0), (-2.0, 0.0), (4.0, 3.0)]
    assert sampled("nearest", "unnormalized", outside) == [9, 9, 9]
    assert sampled("bilinear", "unnormalized", [(-0.5, 0)]) == [5]  # half way from 9 to 1
    assert sampled("bilinear", "unnormalized", outside, padding_mode="border") == [1, 1, 16]
    assert sampled("nearest", "unnormalized", outside, padding_mode="reflection") == [2, 3, 15]
    assert sampled("nearest", "unnormalized", outside, padding_mode="symmetric") == [1, 2, 16]


def test_affine_is_that_of_torch() -> None:
    theta = torch.tensor([[[0.8, 0.3, 0.1], [-0.2, 1.1, -0.3]]]).repeat(2, 1, 1)
    expected = F.grid_sample(IMAGE, F.affine_grid(theta, [2, 3, 4, 6], True), align_corners=True)

    def body(mb: Any, x: Any, matrix: Any) -> Any:
        return mb.affine(
            x=x,
            transform_matrix=matrix,
            output_height=4,
            output_width=6,
            sampling_mode="bilinear",
            padding_mode="constant",
            padding_value=np.float32(0),
            coordinates_mode="normalized_minus_one_to_one",
            align_corners=True,
        )

    (found,) = computed(body, IMAGE.numpy(), theta.reshape(2, 6).numpy())
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("box", "size", "normalized", "expected"),
    [  # coremltools' own test of the operator
        ([1, 1, 2, 2], 2, False, [6, 7, 10, 11]),
        ([1, 1, 2, 2], 1, False, [8.5]),
        ([0, 0, 1 / 3, 1 / 3], 2, True, [1, 2, 5, 6]),
        ([2, 2, 1, 1], 2, False, [11, 10, 7, 6]),
        ([1, 1, 2, 2], 4, False, (6 + np.arange(4)[:, None] * 4 / 3 + np.arange(4) / 3).ravel().tolist()),
    ],
)
@pytest.mark.parametrize("opset", ["iOS15", "iOS17"])
def test_crop_resize_gives_apples_figures(
    box: list[float], size: int, normalized: bool, expected: list[float], opset: Opset
) -> None:
    boxes = np.array([box], np.float32)

    def body(mb: Any, x: Any, given: Any) -> Any:
        where = {"boxes": given} if opset == "iOS17" else {"roi": given}
        return mb.crop_resize(
            x=x,
            target_height=size,
            target_width=size,
            normalized_coordinates=normalized,
            box_coordinate_mode="CORNERS_HEIGHT_FIRST",
            sampling_mode="ALIGN_CORNERS",
            **where,
        )

    given = boxes if opset == "iOS17" else boxes.reshape(1, 1, 4, 1, 1)
    (found,) = computed(body, SQUARE, given, opset=opset)
    assert found.shape == ((1, 1, size, size) if opset == "iOS17" else (1, 1, 1, size, size))
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-6)


def test_boxes_name_their_image_their_axes_and_their_scale(tmp_path: Path) -> None:
    pair = np.concatenate([SQUARE, SQUARE + 100])

    def body(mb: Any, x: Any) -> Any:
        return mb.crop_resize(
            x=x,
            boxes=np.array([[2, 4, 2, 4], [2, 4, 2, 4]], np.float32),  # centre x 2, y 4; 2 wide, 4 high; at scale 1/2
            box_indices=np.array([1, 0], np.int32),
            target_height=2,
            target_width=2,
            spatial_scale=np.float32(0.5),
            box_coordinate_mode="CENTER_SIZE_WIDTH_FIRST",
            sampling_mode="STRICT_ALIGN_CORNERS",
        )

    (found,) = saved(tmp_path, body, {"x": pair.shape})(torch.from_numpy(pair))
    expected = [5.5, 6.5, 13.5, 14.5]  # rows 1 and 3, columns 0.5 and 1.5
    np.testing.assert_allclose(found.reshape(2, 4), [[value + 100 for value in expected], expected])


def test_points_outside_the_image_have_the_given_padding_value() -> None:
    def body(mb: Any, x: Any) -> Any:
        return mb.crop_resize(
            x=x,
            boxes=np.array([[0, -1, 0, 1]], np.float32),
            target_height=1,
            target_width=3,
            sampling_mode="ALIGN_CORNERS",
            pad_value=np.float32(-5),
        )

    assert computed(body, SQUARE)[0].ravel().tolist() == [-5, 1, 2]


def test_roi_align_samples_the_middle_of_each_part() -> None:
    def body(mb: Any, x: Any) -> Any:
        return mb.crop_resize(
            x=x,
            boxes=np.array([[0, 0, 0, 3]], np.float32),
            target_height=1,
            target_width=2,
            sampling_mode="OFFSET_CORNERS",
        )

    assert computed(body, SQUARE)[0].ravel().tolist() == [1.75, 3.25]


def test_a_box_whose_mode_is_not_defined_is_refused() -> None:
    def body(mb: Any, x: Any) -> Any:
        return mb.crop_resize(x=x, boxes=np.array([[0, 0, 1, 1]], np.float32), target_height=2, target_width=2)

    with pytest.raises(CheckFailed, match="sampling_mode DEFAULT of a box"):
        computed(body, SQUARE)
