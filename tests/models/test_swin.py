"""Swin: its rank-4 forms equal the textbook forms, and a block equals masked attention over the whole map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models
from models import checkpoint
from models.swin import Block, merge, neighbours, partition, relative_positions, roll, shift_mask
from tests.support.tracing import kind, of_the_image, traced

FILE = Path("w.pt")
SPEC = models.ALL["swin_mini"]
# All that a traced network may do to what depends on the image. Slices and concatenations are the rolls'.
OPERATORS = {
    *("conv2d", "linear", "matmul", "layer_norm", "softmax", "gelu", "add", "mul", "mean"),
    *("permute", "transpose", "reshape", "split", "getitem", "slice", "cat"),
}


def textbook_partition(x: Tensor, window: int) -> Tensor:
    """Partition with a tensor of rank 6: (N, H, W, C) -> (N * windows, window ** 2, C)."""
    count, height, width, channels = x.shape
    x = x.reshape(count, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window**2, channels)


def textbook_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """Mask of the paper's Figure 4: nine regions of the rolled map, each of which attends only to itself."""
    regions = torch.zeros(1, height, width, 1)
    edges = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for row, rows in enumerate(edges):
        for column, columns in enumerate(edges):
            regions[:, rows, columns] = 3 * row + column
    windows = textbook_partition(regions, window).squeeze(2)
    return torch.where(windows.unsqueeze(1) == windows.unsqueeze(2), 0.0, -100.0)


def attention_over_the_whole_map(block: Block, x: Tensor, shift: int) -> Tensor:
    """Reference of `block.attention`, one pair of tokens at a time: (N, H, W, C) -> the same. Two tokens attend to each
    other if one window of the shifted grid contains both, with a bias by their offset.
    """
    count, height, width, _ = x.shape
    attn, window = block.attn, block.window
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    cells = torch.stack(((rows - shift).div(window, rounding_mode="floor"), (columns - shift) // window))
    together = (cells.unsqueeze(1) == cells.unsqueeze(2)).all(0)
    down, right = rows.unsqueeze(1) - rows, columns.unsqueeze(1) - columns
    table = attn.relative_position_bias_table.reshape(2 * window - 1, 2 * window - 1, attn.heads)
    bias = table[down.clamp(1 - window, window - 1) + window - 1, right.clamp(1 - window, window - 1) + window - 1]
    heads = attn.qkv(x).reshape(count, height * width, 3, attn.heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    barred = torch.where(together, bias.permute(2, 0, 1), -torch.inf)
    answers = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=barred)
    return attn.proj(answers.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


def lively(block: Block) -> Block:
    """Return the network with logits far from uniform, so that a wrong bias or pair changes the output."""
    nn.init.normal_(block.attn.qkv.weight, std=0.3)
    nn.init.normal_(block.attn.relative_position_bias_table)
    return block.eval()


@pytest.mark.parametrize(("height", "width", "window"), [(4, 4, 2), (6, 9, 3), (16, 8, 4), (7, 7, 7)])
def test_windows_equal_the_rank_6_form_and_merging_undoes_them(height: int, width: int, window: int) -> None:
    x = torch.randn(3, height, width, 5)
    windows = partition(x, window)
    assert torch.equal(windows, textbook_partition(x, window))
    assert torch.equal(merge(windows, height, width), x)


@pytest.mark.parametrize("shift", [1, 3, -2])
def test_rolling_equals_that_of_torch_in_both_directions(shift: int) -> None:
    x = torch.randn(2, 6, 9, 3)
    assert torch.equal(roll(x, shift), torch.roll(x, (-shift, -shift), (1, 2)))
    assert torch.equal(roll(roll(x, shift), -shift), x)


@pytest.mark.parametrize(("height", "width", "window"), [(4, 4, 2), (6, 9, 3), (16, 8, 4), (14, 14, 7)])
def test_the_mask_equals_that_of_nine_regions(height: int, width: int, window: int) -> None:
    mask = shift_mask(height, width, window, window // 2, torch.device("cpu"))
    assert torch.equal(mask, textbook_mask(height, width, window, window // 2))
    assert (mask < 0).any()


def test_neighbours_are_ordered_down_before_right() -> None:
    x = torch.randn(2, 6, 4, 3)
    corners = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert torch.equal(neighbours(x), torch.cat(corners, -1))


def test_the_bias_of_a_pair_follows_from_its_distance_alone() -> None:
    # Tokens of a 2x2 window: 0 1 / 2 3. The middle row of the table is for a token and itself.
    assert relative_positions(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 8)])
def test_a_block_equals_attention_over_the_whole_map_between_tokens_of_one_window(
    height: int, width: int, shifted: bool
) -> None:
    block = lively(Block(16, 2, 4, shifted=shifted))
    x = torch.randn(2, height, width, 16)
    expected = attention_over_the_whole_map(block, x, shift=2 if shifted else 0)
    with torch.no_grad():
        torch.testing.assert_close(block.attention(x), expected, rtol=1e-4, atol=1e-5)


def test_a_map_of_one_window_is_not_shifted() -> None:
    shifted, plain = lively(Block(16, 2, 4, shifted=True)), Block(16, 2, 4, shifted=False).eval()
    plain.load_state_dict(shifted.state_dict())
    with torch.no_grad():
        one, four = torch.randn(1, 4, 4, 16), torch.randn(1, 8, 8, 16)
        assert torch.equal(shifted(one), plain(one))
        assert not torch.allclose(shifted(four), plain(four), atol=1e-2)


def test_a_block_normalizes_before_each_branch_and_adds_after_it() -> None:
    block = Block(16, 2, 4, shifted=True).eval()
    for name in ("attn.proj", "mlp.fc2"):
        nn.init.zeros_(block.get_parameter(f"{name}.weight"))
        nn.init.zeros_(block.get_parameter(f"{name}.bias"))
    x = torch.randn(2, 8, 8, 16) * 7
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("size", "shifts"), [(64, 2), (128, 3)])
def test_every_second_block_shifts_except_where_the_map_is_one_window(size: int, shifts: int) -> None:
    network = of_the_image(traced(SPEC.name, size))
    assert sum(kind(node) == "cat" for node in network) == 4 * shifts  # two rolls a block, along two axes


def test_no_tensor_has_more_than_four_axes_and_every_operator_is_a_plain_one() -> None:
    program = traced(SPEC.name, 64)
    network = of_the_image(program)
    assert {kind(node) for node in network} == OPERATORS
    values = [node.meta["val"] for node in network if isinstance(node.meta["val"], Tensor)]
    assert len(values) > 150 and max(value.ndim for value in values) == 4
    images = torch.randn(3, 3, 64, 64)  # another number than the traced one
    assert program.module()(images).shape == (3, 10)


def test_the_weights_are_all_that_a_checkpoint_holds() -> None:
    with torch.device("meta"):
        network = models.ALL["swin_tiny"].build(10)
    assert network.state_dict().keys() == dict(network.named_parameters()).keys()


def test_tables_that_older_files_of_timm_hold_are_left_out() -> None:
    state = SPEC.build(10).state_dict()
    tables = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}
    tables["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    found = checkpoint.recognised(state.keys() | tables.keys(), SPEC.formats)
    assert found and found.name == "huggingface/pytorch-image-models"
    network = SPEC.build(10)
    assert checkpoint.load_into(network, state | tables, FILE, formats=SPEC.formats, head=SPEC.head()) == ()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_merging_ends_a_stage_of_the_authors_and_begins_one_of_ours() -> None:
    theirs = checkpoint.recognised({"layers.0.downsample.norm.weight"}, SPEC.formats)
    assert theirs and theirs.name == "microsoft/Swin-Transformer"
    named = [theirs.renamed(f"layers.{stage}.downsample.reduction.weight") for stage in range(3)]
    assert named == [f"layers.{stage}.downsample.reduction.weight" for stage in (1, 2, 3)]
    assert theirs.renamed("head.bias") == "head.fc.bias"


def test_every_branch_of_the_mini_changes_the_output_before_training() -> None:
    network = SPEC.build(10).eval()
    shares: list[float] = []
    for block in network.modules():
        if isinstance(block, Block):
            block.mlp.register_forward_hook(lambda _, inputs, output: shares.append(float(output.std())))
    with torch.no_grad():
        network(torch.randn(2, 3, 64, 64))
    assert len(shares) == 6 and min(shares) > 0.2
