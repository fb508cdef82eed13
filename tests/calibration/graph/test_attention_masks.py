"""Rows of an attention mask that exclude every key give zeros, in torch and in everything made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.graph import exported_program as programs
from calibration.graph.attention_masks import with_open_rows
from calibration.metrics import snr_db
from pipeline.stages import onnx_export as exporting
from targets.onnx.reference import reference_logits

pytestmark = pytest.mark.slow

SIDE, TOKENS = 16, 16


class Masked(nn.Module):
    """Attention over 16 tokens whose fourth may attend to none; the logits depend on that token only."""

    def __init__(self, kind: str, *, heads: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.stem, self.qkv, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 5)
        allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        allowed[3] = False
        self.kind = kind
        self.mask: Tensor
        closed = torch.zeros(TOKENS, TOKENS).masked_fill(~allowed, -torch.inf)
        self.register_buffer("mask", closed if kind == "float" else allowed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.heads:
            q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in (q, k, v))
        mask = self.mask
        if self.kind == "computed":
            if self.heads:
                mask = (q.mean((1, 3)) > 0)[:, None, None, :].expand(-1, 1, TOKENS, TOKENS) & mask
            else:
                mask = (q.mean(2) > 0)[:, None, :].expand(-1, TOKENS, TOKENS) & mask
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=None if self.kind == "none" else mask)
        mixed = mixed.transpose(1, 2).flatten(2) if self.heads else mixed
        logits: Tensor = self.head(mixed[:, 3] + 0.1 * x[:, 3])
        return logits


def traced(kind: str, *, heads: bool = True) -> tuple[Any, npt.NDArray[np.float32]]:
    torch.manual_seed(0)
    images = torch.randn(4, 3, SIDE, SIDE)
    return programs.export(Masked(kind, heads=heads).eval(), SIDE), images.numpy()


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "computed"])
def test_a_query_that_may_attend_to_nothing_gets_zeros_in_onnx(kind: str, heads: bool, tmp_path: Path) -> None:
    program, images = traced(kind, heads=heads)
    with torch.no_grad():
        expected = program.module()(torch.from_numpy(images)).numpy()
    exporting.check(programs.export(Masked(kind, heads=heads).eval(), SIDE))
    exporting.export(program, images, {"size": SIDE}, tmp_path)
    assert np.isfinite(expected).all()
    assert snr_db(expected, reference_logits(tmp_path / "model.onnx", images)) > 100


def test_a_constant_mask_that_leaves_every_query_a_key_stays_as_it_is() -> None:
    program, _ = traced("bool")
    program.state_dict["mask"][3] = True
    before = len(program.graph.nodes)
    assert len(with_open_rows(program).graph.nodes) == before
