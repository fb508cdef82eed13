"""Hold what artifacts carry against the checkpoint that they were made from, module by module, number by number.

identical  every scale and every int8 weight is the checkpoint's
folded     the same numbers, stored in another way: turned, or once for several modules
rounded    a scale is another number, and the same one in FP16
different  anything else
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import numpy as np

from calibration.carried import Activation, Carried, Weight
from models.errors import CheckFailed

if TYPE_CHECKING:
    from calibration.carried import Integers, Scales

Verdict: TypeAlias = Literal["identical", "folded", "rounded", "different"]
VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)  # from the best to the worst

Pair: TypeAlias = tuple[Carried | None, Carried | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """How one quantity of one module is in one artifact."""

    what: str  # activation scale, weight scales, int8 weights, or the module itself
    verdict: Verdict = "identical"
    note: str = ""  # of all but the identical: what was found and what was expected
    relative: float = 0.0  # largest difference of a rounded scale, as a fraction of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One module in one artifact."""

    module: str
    artifact: str
    operator: str  # what the artifact calls it
    findings: tuple[Finding, ...]
    compared: int = 0  # numbers that were read from the artifact

    @property
    def verdict(self) -> Verdict:
        return worst(finding.verdict for finding in self.findings)

    def __str__(self) -> str:
        told = [f"{found.what}: {found.note}" for found in self.findings if found.verdict == self.verdict]
        return f"{self.module} in {self.artifact} ({self.operator or 'no operator'}): {'; '.join(told)}"


def worst(verdicts: Iterator[Verdict]) -> Verdict:
    return max(verdicts, key=VERDICTS.index, default="identical")


def rows(checkpoint: Path, scales: Path, artifacts: Mapping[str, Path]) -> list[Row]:
    """Compare the torch program `checkpoint` with `scales` (scales.json) and with the files of `artifacts`, each by its
    name and read by the format that its suffix tells.
    """
    from calibration import carried, program

    expected = carried.carried(program.load(checkpoint).module())
    found = _compared("scales.json", _paired_by_name(expected, _listed(scales)))
    for name, path in artifacts.items():
        found += _compared(name, _paired(expected, _read(path)))
    return found


def summary(found: Sequence[Row]) -> dict[str, Any]:
    """Counts of modules by their worst verdict, the same for each artifact, and everything that was found."""
    modules = {row.module: [other for other in found if other.module == row.module] for row in found}
    verdicts = {module: worst(row.verdict for row in those) for module, those in modules.items()}
    artifacts = {name: [row for row in found if row.artifact == name] for name in {row.artifact: None for row in found}}
    return {
        **_counts(verdicts.values()),
        "largest_rounding": max((finding.relative for row in found for finding in row.findings), default=0.0),
        "artifacts": {
            name: {**_counts(row.verdict for row in those), "compared": sum(row.compared for row in those)}
            for name, those in artifacts.items()
        },
        "modules": [
            {
                "module": module,
                "verdict": verdicts[module],
                "artifacts": {
                    row.artifact: {
                        "operator": row.operator,
                        "verdict": row.verdict,
                        "findings": [asdict(finding) for finding in row.findings],
                    }
                    for row in those
                },
            }
            for module, those in modules.items()
        ],
    }


def _counts(verdicts: Any) -> dict[str, int]:
    counted = Counter(verdicts)
    return {verdict: counted[verdict] for verdict in VERDICTS}


# --- Reading --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[Carried]:
    """What a file carries. Raises CheckFailed where it is damaged."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return _reader(path)(path)
    except (DecodeError, LookupError, OSError, RuntimeError, ValueError) as error:  # what damaged files make them raise
        told = " ".join(str(error).split())
        raise CheckFailed(
            f"{path} cannot be read back: {told}; delete {path.parent} and run this again to build it anew"
        ) from error


def _reader(path: Path) -> Callable[[Path], list[Carried]]:
    match path.suffix:
        case ".onnx":
            from targets import _carried_onnx

            return _carried_onnx.carried
        case ".mlpackage":
            from targets import _carried_coreml

            return _carried_coreml.carried
        case ".xml":
            from targets import _carried_openvino

            return _carried_openvino.carried
    raise NotImplementedError(f"{path}: nothing here reads {path.suffix}")


def _listed(scales: Path) -> list[Carried]:
    """The layers of a scales.json; it has no weights, and one scale for both ends of a quantizer."""
    return [
        Carried(
            name=name,
            aliases=(),
            activations=(
                Activation(scales=np.repeat(float(layer["activation"]), 2), zero_point=0, place=f"{name} input"),
            ),
            weight=Weight(integers=None, scales=np.array(layer["weight"], np.float64), zero_point=0, place=name),
        )
        for name, layer in json.loads(scales.read_text()).items()
    ]


# --- Pairing --------------------------------------------------------------------------------------------------------


def _paired(expected: Sequence[Carried], found: Sequence[Carried]) -> list[Pair]:
    """By the names of torch nodes where a format keeps them, in order of execution where it does not."""
    if not any(carried.aliases for carried in found):
        return list(zip_longest(expected, found))
    named = {carried.aliases[0]: carried for carried in expected}
    pairs: list[Pair] = []
    unknown: list[Carried] = []
    for carried in found:
        known = next((alias for alias in carried.aliases if alias in named), None)
        if known is None:
            unknown.append(carried)
        else:
            pairs.append((named.pop(known), carried))
    # torch.onnx numbers additions by itself; what the order pairs wrongly is found to be different.
    return [*pairs, *zip_longest(named.values(), unknown)]


def _paired_by_name(expected: Sequence[Carried], listed: Sequence[Carried]) -> list[Pair]:
    """Layers alone: scales.json lists no other operator."""
    found = {carried.name: carried for carried in listed}
    layers = [(carried, found.pop(carried.name, None)) for carried in expected if carried.weight is not None]
    return [*layers, *((None, carried) for carried in found.values())]


# --- Comparing ------------------------------------------------------------------------------------------------------


def _compared(artifact: str, pairs: Sequence[Pair]) -> list[Row]:
    sharing = _sharing(pairs)
    return [_row(artifact, expected, found, sharing) for expected, found in pairs]


def _sharing(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """Places in an artifact that hold what the checkpoint keeps apart, with the modules that use them."""
    users: dict[str, dict[str, str]] = {}
    for expected, found in pairs:
        if expected is not None and found is not None:
            pairs_of_places = [
                (wanted.place, came.place)
                for wanted, came in zip(expected.activations, found.activations, strict=False)
            ]
            if expected.weight and found.weight:
                pairs_of_places.append((expected.weight.place, found.weight.place))
            for wanted_place, place in pairs_of_places:
                users.setdefault(place, {}).setdefault(wanted_place, expected.name)
    return {place: list(modules.values()) for place, modules in users.items() if len(modules) > 1}


def _row(artifact: str, expected: Carried | None, found: Carried | None, sharing: Mapping[str, list[str]]) -> Row:
    findings: list[Finding] = []
    if expected is None or found is None:
        note = "is not in the checkpoint" if expected is None else "is missing"
        findings.append(Finding(what="quantized operator", verdict="different", note=note))
    else:
        findings += _activations(expected.activations, found.activations, sharing)
        findings += _weight(expected.weight, found.weight, sharing)
    return Row(
        module=(expected or found).name,  # type: ignore[union-attr]  # one of the two there is
        artifact=artifact,
        operator=found.name if found else "",
        findings=tuple(findings),
        compared=_numbers(found) if expected and found else 0,
    )


def _numbers(carried: Carried) -> int:
    weight = carried.weight
    stored = 0 if weight is None else weight.scales.size + (0 if weight.integers is None else weight.integers.size)
    return stored + sum(activation.scales.size for activation in carried.activations)


def _activations(
    expected: Sequence[Activation], found: Sequence[Activation], sharing: Mapping[str, list[str]]
) -> Iterator[Finding]:
    what = "activation scale"
    if len(expected) != len(found):
        note = f"{len(found)} rounded inputs, expected {len(expected)}"
        yield Finding(what=what, verdict="different", note=note)
        return
    for wanted, came in zip(expected, found, strict=True):
        places = ("where it is quantized", "where it is dequantized")
        yield (
            _zero_point(what, came.zero_point)
            or _scales(what, wanted.scales, came.scales, places)
            or _stored(what, sharing.get(came.place), "")
        )


def _weight(expected: Weight | None, found: Weight | None, sharing: Mapping[str, list[str]]) -> Iterator[Finding]:
    if expected is None or found is None:
        if expected is not found:
            came, wanted = ("float" if weight is None else "int8" for weight in (found, expected))
            yield Finding(what="int8 weights", verdict="different", note=f"found {came}, expected {wanted}")
        return
    places = [f"of output channel {index}" for index in range(len(expected.scales))]
    yield (
        _zero_point("weight scales", found.zero_point)
        or _scales("weight scales", expected.scales, found.scales, places)
        or Finding(what="weight scales")
    )
    if expected.integers is not None and found.integers is not None:
        turned, note = _turned(found.integers, expected.integers)
        yield _integers(expected.integers, turned) or _stored(
            "int8 weights", sharing.get(found.place), found.rearranged or note
        )


def _zero_point(what: str, found: int) -> Finding | None:
    return Finding(what=what, verdict="different", note=f"zero point {found}, expected 0") if found else None


def _stored(what: str, modules: Sequence[str] | None, rearranged: str) -> Finding:
    """Of equal numbers: whether they stand in the file as the checkpoint has them."""
    shared = f"stored once for {', '.join(modules)}" if modules else ""
    notes = [note for note in (rearranged, shared) if note]
    return Finding(what=what, verdict="folded", note=", ".join(notes)) if notes else Finding(what=what)


def _scales(what: str, expected: Scales, found: Scales, places: Sequence[str]) -> Finding | None:
    """None where all are identical."""
    if found.shape != expected.shape:
        return Finding(what=what, verdict="different", note=f"{found.size} of them, expected {expected.size}")
    if (found == expected).all():
        return None
    with np.errstate(over="ignore"):  # what is beyond FP16 becomes infinite there
        half, wanted = found.astype(np.float16), expected.astype(np.float16)
    unequal = np.flatnonzero(half != wanted)
    if len(unequal):
        index = unequal[0]
        note = f"found {found[index]!s} {places[index]}, expected {expected[index]!s}"
        return Finding(what=what, verdict="different", note=f"{note} ({len(unequal)} of {found.size} differ)")
    relative = float(np.abs(found / expected - 1).max())
    return Finding(what=what, verdict="rounded", note=f"equal in FP16, {relative:.1e} apart", relative=relative)


def _turned(found: Integers, expected: Integers) -> tuple[Integers, str]:
    """`found` in the shape of what was expected, where it has as many numbers in another one."""
    if found.shape == expected.shape or found.size != expected.size:
        return found, ""
    flat = found.reshape(expected.shape)
    if found.ndim == 2 and found.shape == expected.shape[::-1] and not np.array_equal(flat, expected):
        return found.T, f"transposed, {found.shape}"
    return flat, f"in shape {found.shape}"


def _integers(expected: Integers, found: Integers) -> Finding | None:
    """None where all are identical."""
    what = "int8 weights"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        note = f"{found.dtype} of shape {found.shape}, expected {expected.dtype} of shape {expected.shape}"
        return Finding(what=what, verdict="different", note=note)
    unequal = np.argwhere(found != expected)
    if not len(unequal):
        return None
    place = tuple(map(int, unequal[0]))
    note = f"found {found[place]} at {place}, output channel {place[0]}, expected {expected[place]}"
    return Finding(what=what, verdict="different", note=f"{note} ({len(unequal)} of {found.size} differ)")
