"""Core ML runtime: calls of coremltools on a Mac, and the use of their results. Only the last test needs a Mac.

A Mac is emulated in two ways. `Proxy` replaces the compiled part of coremltools, so that its Python code is the real
one; `ScriptedMachine` replaces coremltools itself, behind the interface `Machine`. Both return the logits of the
reference evaluator.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from calibration.data.preprocess import normalize
from calibration.metrics import snr_db
from models.errors import CannotRunHere
from models.spec import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from pipeline.commands.engine import engine as make_engine
from pipeline.commands.profile import profile as make_profile
from pipeline.reports.dashboard import render
from pipeline.timing.results_db import Results
from targets.base import HasUnits, Placement
from targets.coreml import package as coreml_package
from targets.coreml import runtime
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.mil.evaluator import Evaluator
from targets.coreml.options import CoreMLOptions, Interface
from targets.coreml.runtime import UNITS, Features, LoadedHere, ThisMac, opened
from targets.coreml.target import PACKAGE, TARGET
from tests.support.tiny import tiny_run
from tests.targets.coreml.test_target import SIZE, Toy, built, exported

pytestmark = pytest.mark.slow

MS = 1_000_000
COREML = import_coremltools()
IMAGES = np.random.default_rng(0).random((1, 3, SIZE, SIZE), np.float32)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[Interface, Path]:
    """Return a package of the toy network for each interface."""
    found: dict[Interface, Path] = {}
    interfaces: tuple[Interface, ...] = ("tensor", "image", "classifier")
    for interface in interfaces:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(interface)
        export = replace(exported(folder / "export", "fp16", Toy()), options=CoreMLOptions(interface=interface))
        described = export.description() | {"preprocess": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}}
        (export.path / "model.json").write_text(json.dumps(described))
        found[interface] = built(folder / "engine", export) / PACKAGE
    return found


@dataclass(frozen=True, slots=True)
class Computed:
    """The outputs of a package by the reference evaluator."""

    package: coreml_package.Package

    def __call__(self, inputs: Features) -> dict[str, Any]:
        """Accept the inputs of Core ML: an array or an image."""
        image = inputs["image"]
        array = image if isinstance(image, np.ndarray) else np.array(image, np.float32).transpose(2, 0, 1)[None]
        evaluator = Evaluator(self.package.operations, self.package.outputs)
        answers = evaluator.run({"image": torch.from_numpy(array)})
        return {"logits": answers["logits"].numpy().astype(np.float16)}


def evaluated(package: Path, images: Any) -> Any:
    return Computed(coreml_package.read(package))({"image": images})["logits"].astype(np.float32)


# --- coremltools, without its compiled part ---


class Device:
    """The compiled half of a compute device."""


class PlanProxy:
    """The compiled half of a plan: convolutions on the Neural Engine, all else on the CPU; `silu` has no entry.

    The structure is the package's, with one more operator inside the first one.
    """

    def __init__(self, package: coreml_package.Package) -> None:
        from coremltools.models.compute_device import MLCPUComputeDevice, MLNeuralEngineComputeDevice

        self.cpu, self.engine = MLCPUComputeDevice(Device()), MLNeuralEngineComputeDevice(Device())
        top = [_structure(operation.op_type, operation.name) for operation in package.operations]
        top[0].blocks.append(SimpleNamespace(operations=[_structure("relu", "inner")]))
        main = SimpleNamespace(block=SimpleNamespace(operations=top))
        self.model_structure = SimpleNamespace(program=SimpleNamespace(functions={"main": main}))

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        from coremltools.models.compute_plan import MLComputePlanDeviceUsage

        match operation.operator_name:
            case "ios18.silu" | "const":
                return None
            case "ios18.conv":
                return MLComputePlanDeviceUsage(self.engine, [self.cpu, self.engine])
        return MLComputePlanDeviceUsage(self.cpu, [self.cpu])

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        from coremltools.models.compute_plan import MLComputePlanCost

        return MLComputePlanCost(0.25) if operation.operator_name == "ios18.conv" else None


def _structure(kind: str, name: str) -> Any:
    from coremltools.models.compute_plan import (
        MLModelStructureProgramNamedValueType,
        MLModelStructureProgramOperation,
        MLModelStructureProgramValueType,
    )

    output = MLModelStructureProgramNamedValueType(name=name, type=MLModelStructureProgramValueType())
    kind = kind if kind == "const" else f"ios18.{kind}"
    return MLModelStructureProgramOperation({}, kind, [output], [], None)


class Proxy:
    """The compiled half of a model."""

    newest = 9  # specification version
    refusal: str | None = None
    answered_ns: int | None = 1_500_000
    devices = ("CPU", "GPU", "NeuralEngine")

    def __init__(self, path: str, units: str, function: str, hints: dict[str, str], asset: None) -> None:
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.path, self.units, self.function, self.hints = path, units, function, hints
        self.compute = Computed(coreml_package.read(Path(path)))

    @classmethod
    def maximum_supported_specification_version(cls) -> int:
        return cls.newest

    @classmethod
    def get_all_compute_devices(cls) -> list[Any]:
        from coremltools.models import compute_device

        return [getattr(compute_device, f"ML{name}ComputeDevice")(Device()) for name in cls.devices]

    @staticmethod
    def get_compute_plan(path: str, units: str) -> Any:
        from coremltools.models.compute_plan import MLComputePlan

        assert units == "CPU_AND_NE"
        return MLComputePlan(PlanProxy(coreml_package.read(Path(path.removesuffix("c")))))

    def predict(self, data: dict[str, Any], state: None) -> dict[str, Any]:
        return self.compute(data)

    def get_compiled_model_path(self) -> str:
        return f"{self.path}c"

    def get_load_duration_in_nano_seconds(self) -> int:
        return 7 * MS

    def get_last_predict_duration_in_nano_seconds(self) -> int | None:
        return self.answered_ns


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Proxy]]:
    """Emulate a Mac for coremltools; attributes set on the returned class are reset after the test."""
    from coremltools.models import compute_device, compute_plan, model

    monkeypatch.setattr(runtime, "_HELD", deque())

    class OfThisTest(Proxy):
        pass

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(model, "_macos_version", lambda: (15, 1))  # the real one asks a program of macOS
    monkeypatch.setattr(model, "_MLModelProxy", OfThisTest)
    monkeypatch.setattr(compute_plan, "_MLModelProxy", OfThisTest)
    monkeypatch.setattr(compute_device, "_MLModelProxy", OfThisTest)
    monkeypatch.setattr(compute_plan, "_MLComputePlanProxy", PlanProxy)
    for name in ("CPU", "GPU", "NeuralEngine"):
        monkeypatch.setattr(compute_device, f"_ML{name}ComputeDeviceProxy", Device)
    yield OfThisTest


@pytest.mark.usefixtures("mac")
def test_a_session_returns_logits_and_latencies_of_core_ml(packages: dict[Interface, Path]) -> None:
    with TARGET.open(packages["tensor"].parent) as session:
        assert session.batch == 1
        logits = session.infer(IMAGES)
        assert session.latencies_ns(IMAGES, 3) == [1_500_000] * 3
        assert session.load_ns == 7 * MS
    expected = evaluated(packages["tensor"], IMAGES)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.usefixtures("mac")
def test_predicting_leaves_the_images_as_they_are(packages: dict[Interface, Path]) -> None:
    images = IMAGES.copy()
    with TARGET.open(packages["tensor"].parent) as session:
        first = session.infer(images).copy()
        session.latencies_ns(images, 2)
        np.testing.assert_array_equal(session.infer(images), first)
    np.testing.assert_array_equal(images, IMAGES)


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("unit", UNITS)
def test_a_package_is_loaded_for_the_requested_units(packages: dict[Interface, Path], unit: str) -> None:
    loaded = ThisMac().load(packages["tensor"], unit)
    proxy = loaded.model.__proxy__
    hints = {"reshapeFrequency": "Infrequent", "specializationStrategy": "FastPrediction"}
    assert (proxy.units, proxy.function, proxy.hints) == (unit, "", hints)
    assert loaded.compiled == f"{packages['tensor']}c"


@pytest.mark.usefixtures("mac")
def test_a_function_is_loaded_by_its_name(packages: dict[Interface, Path]) -> None:
    assert ThisMac().load(packages["tensor"], "ALL", "main").model.__proxy__.function == "main"


@pytest.mark.usefixtures("mac")
def test_a_plan_of_any_function_but_the_default_one_is_refused(
    packages: dict[Interface, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = ThisMac().load(packages["tensor"], "CPU_AND_NE", "main")
    assert loaded.plan()
    monkeypatch.setattr(loaded.model, "function_name", "small")
    with pytest.raises(
        CannotRunHere, match=r"a compute plan only for a package's default function, main; build small as"
    ):
        loaded.plan()


@pytest.mark.usefixtures("mac")
def test_inputs_are_held_until_core_ml_has_let_go_of_them(
    packages: dict[Interface, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes coremltools' conversions: a float16 array becomes a float32 array in the dictionary."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with TARGET.open(packages["tensor"].parent) as session:
        session.loaded.predict({"image": IMAGES.astype(np.float16)})
        now += 1
        session.infer(IMAGES)
    held = [inputs["image"] for _, inputs in runtime._HELD]
    assert [array.dtype for array in held] == [np.float32, np.float32] and held[1] is IMAGES
    now += runtime._HELD_SECONDS - 0.5
    runtime._hold({})
    assert [inputs.get("image") is IMAGES for _, inputs in runtime._HELD] == [True, False]


def test_a_mac_without_a_neural_engine_puts_its_times_in_doubt(
    mac: type[Proxy], packages: dict[Interface, Path]
) -> None:
    assert [ThisMac().doubt(unit) for unit in UNITS] == [None] * 4
    mac.devices = ("CPU", "GPU")  # type: ignore[assignment]
    with TARGET.open(packages["tensor"].parent) as session:
        assert session.doubt == "this Mac has no Neural Engine: Core ML silently runs ALL on other devices"
    assert [ThisMac().doubt(unit) is None for unit in UNITS] == [False, True, True, False]
    mac.devices = ("CPU",)  # type: ignore[assignment]
    assert "no GPU" in str(ThisMac().doubt("CPU_AND_GPU"))


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("interface", ["image", "classifier"])
def test_a_package_that_takes_pictures_gets_the_picture(packages: dict[Interface, Path], interface: Interface) -> None:
    """The logits equal those of the image's tensor up to FP16."""
    bytes_ = np.random.default_rng(1).integers(0, 256, (1, 3, SIZE, SIZE), np.uint8)
    images = normalize(bytes_, Preprocess(size=SIZE, mean=IMAGENET_MEAN, std=IMAGENET_STD))
    with TARGET.open(packages[interface].parent) as session:
        (picture,) = session.features(images).values()
        assert (picture.mode, picture.size) == ("RGB", (SIZE, SIZE))
        np.testing.assert_array_equal(np.array(picture).transpose(2, 0, 1), bytes_[0])
        assert snr_db(evaluated(packages["tensor"], images), session.infer(images)) > 40
        assert session.batch == 1


@pytest.mark.usefixtures("mac")
def test_the_plan_has_every_operator_with_its_units_and_cost(packages: dict[Interface, Path]) -> None:
    with TARGET.open_on(packages["tensor"].parent, "CPU_AND_NE") as session:
        plan = session.plan()
    operations = [op for op in coreml_package.read(packages["tensor"]).operations if op.op_type != "const"]
    assert [(found.kind, found.name) for found in plan if found.name != "inner"] == [
        (operation.op_type, operation.name) for operation in operations
    ]
    by_kind = {found.kind: found for found in plan}
    assert by_kind["conv"] == Placement(
        name=by_kind["conv"].name,
        kind="conv",
        preferred="Neural Engine",
        supported=("CPU", "Neural Engine"),
        cost=0.25,
    )
    assert (by_kind["silu"].preferred, by_kind["silu"].supported, by_kind["silu"].cost) == (None, (), None)
    assert by_kind["linear"].preferred == "CPU"


@pytest.mark.usefixtures("mac")
def test_the_plan_has_the_operators_inside_an_operator(packages: dict[Interface, Path]) -> None:
    with TARGET.open_on(packages["tensor"].parent, "CPU_AND_NE") as session:
        assert "inner" in [found.name for found in session.plan()]


def test_a_package_that_core_ml_refuses_raises_an_error_with_its_reason(
    mac: type[Proxy], packages: dict[Interface, Path]
) -> None:
    mac.refusal = "no such operator"
    with (
        pytest.raises(CannotRunHere, match=r"^Core ML on this Mac cannot load .* for ALL: .*no such operator$"),
        TARGET.open(packages["tensor"].parent),
    ):
        pass


def test_a_package_newer_than_core_ml_has_a_specific_error(mac: type[Proxy], packages: dict[Interface, Path]) -> None:
    """coremltools reports this only at the first prediction."""
    mac.newest = 6
    message = r"did not load .*mlpackage, which has specification version \d: update macOS, or build it for an older"
    with pytest.raises(CannotRunHere, match=message), TARGET.open(packages["tensor"].parent):
        pass


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError, OSError, KeyError, Exception])
def test_a_failed_prediction_raises_an_error_with_its_reason(
    mac: type[Proxy], packages: dict[Interface, Path], monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def failing(*_: object) -> None:
        raise kind("Unable to compute the prediction using ML Program")

    monkeypatch.setattr(mac, "predict", failing)
    monkeypatch.setattr(mac, "get_compute_plan", failing)
    with TARGET.open(packages["tensor"].parent) as session:
        for ask, what in ((lambda: session.infer(IMAGES), "cannot predict"), (session.plan, "has no plan")):
            with pytest.raises(CannotRunHere, match=f"^Core ML on this Mac {what}: '?Unable to compute the prediction"):
                ask()


def test_a_prediction_without_a_time_is_refused(mac: type[Proxy], packages: dict[Interface, Path]) -> None:
    mac.answered_ns = None
    with (
        pytest.raises(CannotRunHere, match=r"^Core ML does not report the duration of predictions"),
        TARGET.open(packages["tensor"].parent) as session,
    ):
        session.latencies_ns(IMAGES, 1)


@pytest.mark.usefixtures("mac")
def test_other_warnings_are_still_warnings(packages: dict[Interface, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    original = COREML.models.model._load_spec

    def warns(path: str) -> Any:
        warnings.warn("something else", UserWarning, stacklevel=2)
        return original(path)

    monkeypatch.setattr(COREML.models.model, "_load_spec", warns)
    with pytest.warns(UserWarning, match="something else"):
        ThisMac().load(packages["tensor"], "ALL")


@pytest.mark.usefixtures("mac")
def test_an_old_macos_is_refused_with_the_required_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TARGET.not_executed() is None
    monkeypatch.setattr("platform.mac_ver", lambda: ("14.5", ("", "", ""), "arm64"))
    assert TARGET.not_executed() == "needs macOS 15 or later: this Mac has 14.5"


@pytest.mark.skipif(sys.platform == "darwin", reason="this is macOS")
def test_elsewhere_the_reason_is_one_sentence(packages: dict[Interface, Path]) -> None:
    reason = TARGET.not_executed()
    assert reason is not None and reason.startswith("needs macOS: ")
    with pytest.raises(CannotRunHere, match=f"^{reason}$"), TARGET.open(packages["tensor"].parent):
        pass


@pytest.mark.skipif(sys.platform == "darwin", reason="this is macOS")
def test_elsewhere_nothing_is_timed_and_nothing_built(tmp_path: Path) -> None:
    with pytest.raises(CannotRunHere, match=r"^coreml cannot be timed here; not executed: needs macOS: ") as caught:
        make_profile(tiny_run("fp16", "coreml"), tmp_path)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


# --- the installed coremltools ---


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (
            "models.MLModel",
            ["a.mlpackage"],
            {"compute_units": COREML.ComputeUnit.ALL, "function_name": None, "optimization_hints": {}},
        ),
        ("models.compute_device.MLComputeDevice.get_all_compute_devices", [], {}),
        ("models.MLModel.predict", [None, {}], {}),
        ("models.MLModel.get_compiled_model_path", [None], {}),
        ("models.MLModel.get_spec", [None], {}),
        ("models.compute_plan.MLComputePlan.load_from_path", ["a.mlmodelc"], {"compute_units": COREML.ComputeUnit.ALL}),
        ("models.compute_plan.MLComputePlan.get_compute_device_usage_for_mlprogram_operation", [None, None], {}),
        ("models.compute_plan.MLComputePlan.get_estimated_cost_for_mlprogram_operation", [None, None], {}),
        ("utils.load_spec", ["a.mlpackage"], {}),
    ],
)
def test_coremltools_accepts_the_arguments_of_the_runtime(
    function: str, arguments: list[Any], named: dict[str, Any]
) -> None:
    inspect.signature(attrgetter(function)(COREML)).bind(*arguments, **named)


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        ("models.MLModel", ["load_duration_in_nano_seconds", "last_predict_duration_in_nano_seconds"]),
        ("models.compute_plan.MLComputePlan", ["model_structure"]),
    ],
)
def test_coremltools_has_the_properties_that_are_read(owner: str, names: list[str]) -> None:
    for name in names:
        assert isinstance(getattr(attrgetter(owner)(COREML), name), property)


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ("MLModelStructure", {"program"}),
        ("MLModelStructureProgram", {"functions"}),
        ("MLModelStructureProgramFunction", {"block"}),
        ("MLModelStructureProgramBlock", {"operations"}),
        ("MLModelStructureProgramOperation", {"operator_name", "outputs", "blocks"}),
        ("MLModelStructureProgramNamedValueType", {"name"}),
        ("MLComputePlanDeviceUsage", {"preferred_compute_device", "supported_compute_devices"}),
        ("MLComputePlanCost", {"weight"}),
    ],
)
def test_coremltools_has_the_fields_that_are_read(record: str, names: set[str]) -> None:
    assert names <= {found.name for found in fields(getattr(COREML.models.compute_plan, record))}


def test_every_choice_of_units_and_every_device_has_its_name() -> None:
    assert set(UNITS) == {unit.name for unit in COREML.ComputeUnit}
    device = COREML.models.compute_device
    assert runtime._DEVICES.keys() == {kind.__name__ for kind in device.MLComputeDevice.__subclasses__()}


# --- another machine ---


LATENCIES = {"ALL": MS // 2, "CPU_ONLY": 20 * MS, "CPU_AND_GPU": 2 * MS, "CPU_AND_NE": MS // 4}  # ns
FIRST, LOADING = 50 * MS, {"ALL": 900 * MS, "CPU_ONLY": 30 * MS, "CPU_AND_GPU": None, "CPU_AND_NE": 800 * MS}


@dataclass(kw_only=True, slots=True)
class Scripted:
    """A loaded package whose first prediction is slow. `asked`: number of predictions of each call."""

    unit: str
    compute: Callable[[Features], dict[str, Any]]
    asked: list[int]

    @property
    def load_ns(self) -> int | None:
        return LOADING[self.unit]

    def predict(self, inputs: Features) -> Features:
        return self.compute(inputs)

    def latencies_ns(self, inputs: Features, count: int) -> list[int]:
        self.asked.append(count)
        assert inputs["image"].shape == (1, 3, 16, 16)
        first = [FIRST] if len(self.asked) == 1 else []
        return [*first, *[LATENCIES[self.unit]] * (count - len(first))]

    def plan(self) -> list[Placement]:
        preferred = "CPU" if self.unit == "CPU_ONLY" else "Neural Engine"
        conv = Placement(name="x_1", kind="conv", preferred=preferred, supported=("CPU", "Neural Engine"), cost=0.75)
        gather = Placement(name="x_2", kind="gather", preferred="CPU", supported=("CPU",), cost=0.25)
        return [conv, gather, Placement(name="w", kind="constexpr_lut", preferred=None, supported=(), cost=None)]


@dataclass(frozen=True, slots=True)
class ScriptedMachine:
    asked: dict[str, list[int]] = field(default_factory=dict)

    def not_executed(self) -> str | None:
        return None

    def doubt(self, unit: str) -> str | None:
        return "it is scripted" if unit == "CPU_AND_GPU" else None

    def load(self, package: Path, unit: str, function: str | None = None) -> Scripted:
        compute = Computed(coreml_package.read(package))
        return Scripted(unit=unit, compute=compute, asked=self.asked.setdefault(unit, []))


@pytest.fixture(scope="module")
def profiled(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return result, rows and calls of `profile` on a machine with four sets of units."""
    root = tmp_path_factory.mktemp("profile")
    for name in ("weights", "quantized", "exported"):
        (shared / name).mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(shared / name)
    machine = ScriptedMachine()
    run = tiny_run("fp16", replace(TARGET, machine=machine))
    make_engine(run, root)
    machine.asked.clear()
    answer = make_profile(run, root)
    results = Results(root / "measurements.sqlite")
    rows = {row.unit: row for row in results.rows()}
    overview = results.overview()
    results.close()
    return SimpleNamespace(answer=answer, rows=rows, overview=overview, asked=machine.asked)


def test_the_target_has_units_and_opens_the_first_by_itself(packages: dict[Interface, Path]) -> None:
    machine = ScriptedMachine()
    target = replace(TARGET, machine=machine)
    assert isinstance(target, HasUnits) and target.units == UNITS
    with target.open(packages["tensor"].parent) as session:
        np.testing.assert_array_equal(session.infer(IMAGES), evaluated(packages["tensor"], IMAGES))
    assert list(machine.asked) == ["ALL"]


def test_every_choice_of_units_gets_a_row(profiled: Any) -> None:
    assert tuple(profiled.rows) == tuple(profiled.answer["units"]) == UNITS
    for unit, row in profiled.rows.items():
        assert row.summary.p50_ms == LATENCIES[unit] / MS
        assert profiled.answer["units"][unit]["p50_ms"] == row.summary.p50_ms
        assert row.top1 == 100
        assert row.summary.valid or "busy" in row.summary.why_invalid or unit == "CPU_AND_GPU"
    assert profiled.rows["CPU_AND_GPU"].summary.why_invalid.startswith("it is scripted")


def test_the_result_is_from_all_units(profiled: Any) -> None:
    contract = ("p50_ms", "p90_ms", "p99_ms", "n", "valid", "why_invalid")
    assert {name: profiled.answer[name] for name in contract} == {
        name: profiled.answer["units"]["ALL"][name] for name in contract
    }
    assert profiled.answer["p50_ms"] == 0.5
    json.dumps(profiled.answer)


def test_loading_first_prediction_and_warm_up_are_not_part_of_the_timing(profiled: Any) -> None:
    for unit, row in profiled.rows.items():
        loading = LOADING[unit]
        assert (row.load_ms, row.first_ms) == (None if loading is None else loading / MS, 50)
        assert profiled.answer["units"][unit]["load_ms"] == row.load_ms
        assert row.summary.max_ms == LATENCIES[unit] / MS  # the first one is not among them
        first, warm_up, *timed = profiled.asked[unit]
        assert (first, warm_up, sum(timed)) == (1, 20, row.summary.n)


def test_a_unit_is_timed_for_a_thousand_predictions_or_ten_seconds(profiled: Any) -> None:
    assert {unit: row.summary.n for unit, row in profiled.rows.items()} == {
        "ALL": 1008,
        "CPU_ONLY": 512,  # of 20 ms each
        "CPU_AND_GPU": 1008,
        "CPU_AND_NE": 1008,
    }
    assert profiled.rows["ALL"].method["either"] is True


def test_the_plan_is_stored_with_each_row_and_summarized_in_the_result(profiled: Any) -> None:
    row = profiled.rows["CPU_AND_NE"]
    assert list(row.plan) == Scripted(unit="CPU_AND_NE", compute=dict, asked=[]).plan()
    assert profiled.answer["units"]["CPU_AND_NE"]["placement"] == {
        "Neural Engine": {"operators": 1, "cost": 0.75, "kinds": {"conv": 1}},
        "CPU": {"operators": 1, "cost": 0.25, "kinds": {"gather": 1}},
        "not placed": {"operators": 1, "cost": 0, "kinds": {"constexpr_lut": 1}},
    }
    assert list(profiled.answer["units"]["CPU_ONLY"]["placement"]) == ["CPU", "not placed"]


def test_the_dashboard_shows_every_choice_of_units(profiled: Any) -> None:
    page = render(profiled.overview, now=datetime.now(UTC))
    for unit in UNITS:
        assert f"<td>{unit}</td>" in page


# --- on a Mac ---


@pytest.mark.skipif(TARGET.not_executed() is not None, reason=f"{TARGET.not_executed()}")
@pytest.mark.parametrize("unit", UNITS)
def test_core_ml_matches_the_reference_evaluator(packages: dict[Interface, Path], unit: str) -> None:
    with opened(ThisMac(), packages["tensor"], unit) as session:
        assert isinstance(session.loaded, LoadedHere)
        assert session.load_ns is None or session.load_ns > 0
        assert snr_db(evaluated(packages["tensor"], IMAGES), session.infer(IMAGES)) > 30
        assert all(taken > 0 for taken in session.latencies_ns(IMAGES, 5))
        plan = session.plan()
    assert {found.kind for found in plan} >= {"conv", "linear"}
    assert {found.preferred for found in plan} - {None} <= {"CPU", "GPU", "Neural Engine"}
    assert 0 < sum(found.cost or 0 for found in plan) <= 1.01
