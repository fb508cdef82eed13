"""Python files that define a network, most of them with a fault."""

from __future__ import annotations

import random
from typing import Final

from tests.fuzz.mutate import mutated_text

_TEMPLATE: Final = """\
import math
import torch
from torch import nn
import torch.nn.functional as F
{top}

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)
        {init}

    def forward(self, x):
        {first}
        x = self.norm(self.conv(x)).relu()
        {middle}
        x = x.mean((2, 3))
        {last}
        return {answer}


def net({signature}):
    {body}
"""
_TOP: Final = (
    *("", "", "", "", "import os", "raise ValueError('no')", "raise SystemExit(0)", "import no_such_module", "1 / 0"),
    *(
        "torch.set_grad_enabled(False)",
        "torch.set_default_dtype(torch.float64)",
        "def f(",
        "x = '\\ud800'",
        "FORMATS = 3",
    ),
    *("from models.spec import ModelSpec, Preprocess, Sizes", "import net", "raise BaseException('x')", "net = 3"),
    *("raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})()", "assert False"),
    "from models.spec import *\nSPECS = [ModelSpec(name='', network='net:net', preprocess=None, sizes=None)]",
    "from models.spec import *\nSPECS = [ModelSpec(name='x' * 500, network='net:net', preprocess=Preprocess(size=-1), "
    "sizes=Sizes(multiple_of=0, minimum=0))]",
    "from models.spec import *\nSPEC = ModelSpec(name='a/../b', network='net:net', preprocess=Preprocess(size=32, "
    "mean='x', std=(0, 0, 0), crop=None), sizes=Sizes(multiple_of=1, minimum=1))",
    "from models.spec import *\nSPEC = ModelSpec(name='\\x1b[2J', network=None, preprocess=Preprocess(size=32), "
    "sizes=Sizes(multiple_of=8, minimum=8))",
)
_INIT: Final = (
    *(
        "",
        "",
        "",
        "",
        "self.pattern = torch.randn(8, 1, 1)",
        "self.register_buffer('b', torch.randn(8), persistent=False)",
    ),
    *(
        "self.me = self",
        "self.lazy = nn.LazyLinear(4)",
        "self.head.weight.data.fill_(float('nan'))",
        "raise SystemExit(2)",
    ),
    *("nn.utils.weight_norm(self.head)", "nn.utils.parametrizations.weight_norm(self.head)", "self.f = lambda x: x"),
    *(
        "self.head = None",
        "self.eval()",
        "self.requires_grad_(False)",
        "del self.head",
        "self.conv = nn.Conv2d(1, 8, 3)",
    ),
    *("self.extra = nn.Parameter(torch.zeros(3, dtype=torch.complex64))", "self.lock = __import__('threading').Lock()"),
    *("self.big = nn.Parameter(torch.zeros(1).expand(10, 10))", "self.to('meta')", "self.double()", "self.half()"),
    *("self.state_dict = lambda *a, **k: {}", "self.train = None", "self.module = nn.Linear(2, 2)"),
    "self.register_buffer('count', torch.zeros((), dtype=torch.long))",
)
_FIRST: Final = (
    *(
        "",
        "",
        "",
        "x.mul_(0.5)",
        "x = F.dropout(x, 0.3)",
        "import sys; sys.exit(0)",
        "raise BaseException('x')",
        "print(x)",
    ),
    *(
        "assert x.shape[0] < 3",
        "if x.sum() > 0: x = -x",
        "x = x[:, :, ::-1]",
        "x = x.numpy()",
        "x = torch.stack([i for i in x])",
    ),
    *("torch.set_grad_enabled(False)", "self.train()", "self.eval()", "x = x.half().float()", "x = x.unfold(2, 3, 1)"),
    *(
        "x = x / 0",
        "x = x.view(2, 3, 32, 32)",
        "self.conv.weight.data.add_(1)",
        "raise type('E', (Exception,), {})('\\n\\n')",
    ),
)
_MIDDLE: Final = (
    *(
        "",
        "",
        "",
        "x = x * float('nan')",
        "x = x.double()",
        "x = x.reshape(-1, 8, 1, 1, 1, 1)",
        "x = x[:1]",
        "x = x + torch.rand(1)",
    ),
    *("x = x.clamp(min=1e-6).pow(3)", "x = torch.linalg.inv(x)", "x = torch.fft.fft2(x).abs()", "x = x.to(torch.int8)"),
    *(
        "x = F.scaled_dot_product_attention(x, x, x)",
        "x = F.interpolate(x, scale_factor=2)",
        "x = x.sort(1).values",
        "x = None",
    ),
    *("x = F.grid_sample(x, torch.zeros(x.shape[0], 4, 4, 2))", "self.norm.running_mean += 1", "x = x.to_sparse()"),
    *("x = x.permute(0, 2, 3, 1)", "x = torch.zeros(2**40)", "x = x.detach()", "x = x.cumsum(1)", "x = x.nonzero()"),
)
_LAST: Final = (
    "",
    "",
    "",
    "x = x / x.norm()",
    "x = x.unsqueeze(-1)",
    "x = x.squeeze()",
    "x = x[0]",
    "global leak; leak = x",
)
_ANSWER: Final = (
    *("self.head(x)",) * 6,
    *("x", "(self.head(x), x)", "{'logits': self.head(x)}", "None", "self.head(x).argmax(1)", "self.head(x).double()"),
    *(
        "self.head(x).sum()",
        "[self.head(x)]",
        "self.head(x)[:, :3]",
        "self.head(x).detach()",
        "torch.zeros(x.shape[0], 10)",
    ),
    *("self.head(x) + float('inf')", "self.head(x).to_sparse()", "'logits'", "self.head(x).unsqueeze(1)", "self"),
)
_SIGNATURE: Final = (
    "classes",
    "classes",
    "classes",
    "classes=10",
    "",
    "*args",
    "**kwargs",
    "num_classes, x",
    "a, b",
    "classes, /",
)
_BODY: Final = (
    *("return Net(classes)",) * 6,
    *("return Net(10)", "return Net", "return None", "return nn.Sequential()", "return lambda x: x", "yield Net(10)"),
    *(
        "return net(classes)",
        "raise RuntimeError('x' * 10000)",
        "return Net('10')",
        "return Net(-1)",
        "return torch.jit.script(Net(10))",
    ),
    *(
        "return nn.Identity()",
        "import sys; sys.exit(3)",
        "return Net(10).to('meta')",
        "return Net(classes).state_dict()",
    ),
    "class T(torch.Tensor): pass\n    return nn.Linear(3, 10)",
)


def source(rng: random.Random) -> str:
    """Return the source of a file with a function `net`, possibly with a fault."""
    one = {
        name: rng.choice(choices) if rng.random() < 0.18 else choices[0]
        for name, choices in (
            ("top", _TOP),
            ("init", _INIT),
            ("first", _FIRST),
            ("middle", _MIDDLE),
            ("last", _LAST),
            ("answer", _ANSWER),
            ("signature", _SIGNATURE),
            ("body", _BODY),
        )
    }
    text = _TEMPLATE.format(**{name: value or "pass" for name, value in one.items()})
    return mutated_text(rng, text) if rng.random() < 0.2 else text
