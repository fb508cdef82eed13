"""Command lines by Hypothesis: valid values, values that are nearly valid, and texts that no variable expects."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.mutate import TEXTS

_AT_ONCE: Final = 100  # command lines that one run of Hypothesis draws

_VALID: Final[dict[str, tuple[str, ...]]] = {
    "model": ("mobilevit_xs", "convmixer_mini", "swin_mini", "net.py:net", "timm:resnet18", "x.py"),
    "target": ("cpu", "onnxruntime", "coreml", "iphone", "null", "jetson", "rtx", "nvidia"),
    "recipe": ("fp32", "fp16", "int8_ptq", "int8_qat", "int8_lsq", "w8a16", "w4a16", "palette6", "palette4"),
    "data": (
        "digits",
        ".",
        "/",
        "/dev",
        "/dev/null",
        "/proc/self/fd",
        "~",
        "~root",
        "~nobody-here/x",
        "no/such/folder",
    ),
    "weights": ("timm", "./timm", "x.pt", "x.safetensors", "/dev/zero", "/dev/null", ".", "x.pt#model", "#", "x#"),
    "size": ("16", "32", "64", "224", "1024", "0", "99999"),
    "batch": ("1", "4", "256", "257"),
    "device": ("local", "board"),
    "seed": ("0", "1", "4294967295", "4294967296"),
    "form": ("tokens", "channels"),
    "interface": ("tensor", "image", "classifier"),
    "deployment": ("iOS16", "iOS18", "macOS15", "iOS26"),
    "calibrator": ("auto", "minmax", "entropy", "mse", "percentile"),
    "placement": (
        "conv",
        "conv+linear",
        "layers",
        "all",
        "none",
        "conv-stages.0",
        "conv+-",
        "-",
        "+",
        "conv-",
        "all--",
    ),
    "max_drop": ("0.5", "99%", "0", "100", "101", "49%", "1.", ".5", "1e3"),
    "force": ("1", "0", "yes", "no"),
    "verdict": ("yes", "no"),
    "models": ("mobilevit_xs", "mobilevit_xs swin_mini", "a,b"),
    "sizes": ("64 128", "64,128", "0"),
    "recipes": ("fp16 int8_ptq", "fp16,w8a16"),
}
_OF_RUNS: Final = sorted(_VALID.keys() - {"models", "verdict"})  # options of `explain` and `multifunction`
_VERBS: Final = ("explain",) * 12 + (
    "multifunction",
    "placement-",
    "models",
    "targets",
    "dashboard",
    "",
    "--help",
    "-h",
)

# What a shell can pass: any text without NUL, bytes that are no UTF-8 included, as lone surrogates.
_ANY: Final = st.text(
    st.one_of(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
        st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF),
    ),
    max_size=40,
)
_ODD: Final = st.one_of(
    st.sampled_from(TEXTS),
    _ANY,
    st.integers().map(str),
    st.floats().map(str),
    st.from_regex(r"\A[-+]?[0-9²٣_]{1,12}[.%e]?[0-9]{0,3}\Z"),
    st.builds(
        lambda text, times: text * times,
        st.sampled_from(("x", "/", "../", "é", "a+", "-", ":", "~")),
        st.integers(1, 5000),
    ),
)


@st.composite
def _value(draw: st.DrawFn, name: str) -> str:
    kind = draw(st.integers(0, 5))
    if kind <= 1:
        return str(draw(st.sampled_from(_VALID[name])))
    if kind <= 3:
        return str(draw(_ODD))
    valid, odd = draw(st.sampled_from(_VALID[name])), draw(_ODD)[:40]
    at = draw(st.integers(0, len(valid)))
    return f"{valid[:at]}{odd}{valid[at + draw(st.integers(0, 2)) :]}"


@st.composite
def _command(draw: st.DrawFn) -> list[str]:
    verb = draw(st.one_of(st.sampled_from(_VERBS), _ODD) if draw(st.integers(0, 9)) == 0 else st.sampled_from(_VERBS))
    known = sorted(_VALID) if draw(st.integers(0, 19)) == 0 else _OF_RUNS
    names = draw(st.lists(st.sampled_from(known), min_size=1, max_size=4, unique=True))
    arguments = [f"--{name}={draw(_value(name))}" for name in names]
    if draw(st.integers(0, 19)) == 0:  # the shape of the line itself
        arguments.insert(
            draw(st.integers(0, len(arguments))), draw(st.one_of(st.sampled_from(("--", "-", "--data", "--x=1")), _ODD))
        )
    # Two that read only: the others would train where every value happens to be right.
    reads = verb.strip() in ("explain", "models", "targets", "dashboard") or verb.strip() not in _BUILDING
    return [verb if reads else "explain", *arguments]


_BUILDING: Final = frozenset(
    {"engine", "calibrate", "qat", "sensitivity", "tune", "prove", "verify", "profile", "placement", "lint-model"}
    | {"zoo", "multifunction"}
)


def arguments(case: int) -> list[str]:
    """Return the command line of a case."""
    return _drawn(case // _AT_ONCE)[case % _AT_ONCE]


@functools.lru_cache(maxsize=4)
def _drawn(batch: int) -> list[list[str]]:
    found: list[list[str]] = []

    @seed(batch)
    @settings(
        max_examples=_AT_ONCE,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_command())
    def draw(command: list[str]) -> None:
        found.append(command)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw()
    padding: list[Any] = [["explain"]] * (_AT_ONCE - len(found))  # where Hypothesis has drawn fewer
    return [*found, *padding][:_AT_ONCE]
