"""Parity of quantization parameters: compare the scales and int8 weights of artifacts with their checkpoint, number by
number for each module.

identical  every scale and every int8 weight equals the checkpoint's
folded     equal numbers in another layout: transposed or reshaped, or stored once for several modules
rounded    a scale differs, but is equal after conversion to FP16
different  any other difference
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

from calibration.graph.qparams import Activation, Carried, Weight
from models.errors import CheckFailed

if TYPE_CHECKING:
    from calibration.graph.qparams import Integers, Scales

Verdict: TypeAlias = Literal["identical", "folded", "rounded", "different"]
VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)  # best to worst

Pair: TypeAlias = tuple[Carried | None, Carried | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Comparison of one quantity of one module in one artifact with the checkpoint."""

    what: str  # activation scale, weight scales, int8 weights, or quantized operator
    verdict: Verdict = "identical"
    note: str = ""  # found and expected values; "" if identical
    relative: float = 0.0  # largest relative difference of a rounded scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """All findings of one module in one artifact."""

    module: str
    artifact: str
    operator: str  # its name in the artifact
    findings: tuple[Finding, ...]
    compared: int = 0  # numbers read from the artifact

    @property
    def verdict(self) -> Verdict:
        return worst(finding.verdict for finding in self.findings)

    def __str__(self) -> str:
        notes = [f"{finding.what}: {finding.note}" for finding in self.findings if finding.verdict == self.verdict]
        return f"{self.module} in {self.artifact} ({self.operator or 'no operator'}): {'; '.join(notes)}"


def worst(verdicts: Iterator[Verdict]) -> Verdict:
    return max(verdicts, key=VERDICTS.index, default="identical")


def rows(checkpoint: Path, scales: Path, artifacts: Mapping[str, Path]) -> list[Row]:
    """Compare the torch program `checkpoint` with the file `scales` (scales.json) and with the files of `artifacts`, by
    artifact name. The suffix of a file selects its reader: .onnx, .mlpackage or .xml.

    Raises CheckFailed if an artifact is damaged, NotImplementedError for another suffix.
    """
    from calibration.graph import exported_program, qparams

    expected = qparams.carried(exported_program.load(checkpoint).module())
    compared = _compared("scales.json", _paired_by_name(expected, _listed(scales)))
    for name, path in artifacts.items():
        compared += _compared(name, _paired(expected, _read(path)))
    return compared


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the report: counts of modules by their worst verdict, overall and per artifact, and all findings."""
    modules = {row.module: [other for other in rows if other.module == row.module] for row in rows}
    verdicts = {module: worst(row.verdict for row in own) for module, own in modules.items()}
    artifacts = {name: [row for row in rows if row.artifact == name] for name in {row.artifact: None for row in rows}}
    return {
        **_counts(verdicts.values()),
        "largest_rounding": max((finding.relative for row in rows for finding in row.findings), default=0.0),
        "artifacts": {
            name: {**_counts(row.verdict for row in own), "compared": sum(row.compared for row in own)}
            for name, own in artifacts.items()
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
                    for row in own
                },
            }
            for module, own in modules.items()
        ],
    }


def _counts(verdicts: Any) -> dict[str, int]:
    counted = Counter(verdicts)
    return {verdict: counted[verdict] for verdict in VERDICTS}


# --- Reading --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[Carried]:
    """Read the quantization parameters and weights of a file. Raises CheckFailed if the file is damaged."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return _reader(path)(path)
    except (DecodeError, LookupError, OSError, RuntimeError, ValueError) as error:  # raised by readers of damaged files
        reason = " ".join(str(error).split())
        raise CheckFailed(
            f"{path} cannot be read back: {reason}; delete {path.parent} and run the same command again to rebuild it"
        ) from error


def _reader(path: Path) -> Callable[[Path], list[Carried]]:
    match path.suffix:
        case ".onnx":
            from targets.onnx import qparams as onnx_qparams

            return onnx_qparams.carried
        case ".mlpackage":
            from targets.coreml import qparams as coreml_qparams

            return coreml_qparams.carried
        case ".xml":
            from targets.openvino import qparams as openvino_qparams

            return openvino_qparams.carried
    raise NotImplementedError(f"{path}: no reader for {path.suffix} files; expected .onnx, .mlpackage or .xml")


def _listed(scales: Path) -> list[Carried]:
    """Read the layers of a scales.json, which has no weights, and one scale for Q and DQ of an activation."""
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
    """Pair operators by the names of torch nodes if the format keeps them, otherwise by order of execution."""
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
    # torch.onnx renumbers additions, so the rest is paired by order; a wrong pair is reported as different.
    return [*pairs, *zip_longest(named.values(), unknown)]


def _paired_by_name(expected: Sequence[Carried], listed: Sequence[Carried]) -> list[Pair]:
    """Pair layers by name; operators without weights are left out, as scales.json lists layers only."""
    by_name = {carried.name: carried for carried in listed}
    layers = [(carried, by_name.pop(carried.name, None)) for carried in expected if carried.weight is not None]
    return [*layers, *((None, carried) for carried in by_name.values())]


# --- Comparing ------------------------------------------------------------------------------------------------------


def _compared(artifact: str, pairs: Sequence[Pair]) -> list[Row]:
    sharing = _sharing(pairs)
    return [_row(artifact, expected, found, sharing) for expected, found in pairs]


def _sharing(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """Return the places of an artifact that several modules share but the checkpoint stores separately, with the
    modules.
    """
    users: dict[str, dict[str, str]] = {}
    for expected, found in pairs:
        if expected is not None and found is not None:
            pairs_of_places = [
                (reference.place, activation.place)
                for reference, activation in zip(expected.activations, found.activations, strict=False)
            ]
            if expected.weight and found.weight:
                pairs_of_places.append((expected.weight.place, found.weight.place))
            for reference_place, place in pairs_of_places:
                users.setdefault(place, {}).setdefault(reference_place, expected.name)
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
        module=(expected or found).name,  # type: ignore[union-attr]  # at most one of the two is None
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
        note = f"{len(found)} quantized inputs, expected {len(expected)}"
        yield Finding(what=what, verdict="different", note=note)
        return
    for reference, activation in zip(expected, found, strict=True):
        places = ("where it is quantized", "where it is dequantized")
        yield (
            _zero_point(what, activation.zero_point)
            or _scales(what, reference.scales, activation.scales, places)
            or _stored(what, sharing.get(activation.place), "")
        )


def _weight(expected: Weight | None, found: Weight | None, sharing: Mapping[str, list[str]]) -> Iterator[Finding]:
    if expected is None or found is None:
        if expected is not found:
            types = ["float" if weight is None else "int8" for weight in (found, expected)]
            yield Finding(what="int8 weights", verdict="different", note=f"found {types[0]}, expected {types[1]}")
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
    """Return the finding for equal numbers: folded if the file stores them in another layout or shares them."""
    shared = f"stored once for {', '.join(modules)}" if modules else ""
    notes = [note for note in (rearranged, shared) if note]
    return Finding(what=what, verdict="folded", note=", ".join(notes)) if notes else Finding(what=what)


def _scales(what: str, expected: Scales, found: Scales, places: Sequence[str]) -> Finding | None:
    """Compare scales; None if all are identical."""
    if found.shape != expected.shape:
        return Finding(what=what, verdict="different", note=f"{found.size} values, expected {expected.size}")
    if (found == expected).all():
        return None
    with np.errstate(over="ignore"):  # values beyond the range of FP16 become infinite
        half, expected_half = found.astype(np.float16), expected.astype(np.float16)
    unequal = np.flatnonzero(half != expected_half)
    if len(unequal):
        index = unequal[0]
        note = f"found {found[index]!s} {places[index]}, expected {expected[index]!s}"
        return Finding(what=what, verdict="different", note=f"{note} ({len(unequal)} of {found.size} differ)")
    relative = float(np.abs(found / expected - 1).max())
    return Finding(what=what, verdict="rounded", note=f"equal in FP16, {relative:.1e} apart", relative=relative)


def _turned(found: Integers, expected: Integers) -> tuple[Integers, str]:
    """Return `found` in the shape of `expected`, transposed or reshaped, with a note; unchanged if the sizes differ."""
    if found.shape == expected.shape or found.size != expected.size:
        return found, ""
    flat = found.reshape(expected.shape)
    if found.ndim == 2 and found.shape == expected.shape[::-1] and not np.array_equal(flat, expected):
        return found.T, f"transposed, {found.shape}"
    return flat, f"in shape {found.shape}"


def _integers(expected: Integers, found: Integers) -> Finding | None:
    """Compare int8 weights; None if all are identical."""
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
