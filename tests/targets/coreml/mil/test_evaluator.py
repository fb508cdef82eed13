"""Reference evaluator: types of a program, constant folding and caching, and errors."""

from __future__ import annotations

import functools
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.errors import BadRequest, CheckFailed
from targets.coreml import package as coreml_package
from targets.coreml.mil.evaluator import Evaluator, Rounding
from targets.coreml.mil.registry import OPERATORS
from tests.support.mil_programs import Body, Inputs, in_memory, program, save, saved

VECTOR = {"x": (3,)}


def evaluator(body: Body, inputs: Inputs, *, rounding: Rounding = "fp16", **kwargs: Any) -> Evaluator:
    main = program(body, inputs, **kwargs).functions["main"]
    return Evaluator(main.operations, [output.name for output in main.outputs], rounding=rounding)


def chain(mb: Any, x: Any) -> Any:
    """relu, then twice that, then plus one"""
    return mb.add(x=mb.mul(x=mb.relu(x=x, name="first"), y=2.0, name="second"), y=1.0, name="third")


# Precision


def test_values_declared_as_half_are_rounded_to_it_and_overflow() -> None:
    def body(mb: Any, x: Any) -> Any:
        return mb.mul(x=x, y=np.float16(300), name="times"), mb.add(x=x, y=np.float16(2**-11), name="plus")

    x = torch.tensor([1.0, 300.0, -300.0])
    product, total = in_memory(body, VECTOR, dtype="fp16")(x)
    assert product.tolist() == [300, float("inf"), -float("inf")]
    assert total.tolist() == [1, 300, -300]  # 2**-11 is half a step there: to even
    product, total = in_memory(body, VECTOR, dtype="fp16", rounding="exact")(x)
    assert product.tolist() == [300, 90000, -90000]
    assert total[0] == 1 + 2**-11
    assert product.dtype == total.dtype == torch.float32


def test_inputs_declared_as_half_are_rounded_to_it() -> None:
    """One is subtracted, so that the output can represent digits that the input must lose."""
    chosen: tuple[tuple[Rounding, float], ...] = (("fp16", 0.0), ("exact", 2**-12))
    for rounding, expected in chosen:
        run = in_memory(lambda mb, x: mb.add(x=x, y=np.float16(-1)), VECTOR, dtype="fp16", rounding=rounding)
        assert run(torch.full((3,), 1 + 2**-12))[0].tolist() == [expected] * 3


def test_values_declared_as_float_are_never_rounded() -> None:
    (found,) = in_memory(lambda mb, x: mb.mul(x=x, y=300.0), VECTOR)(torch.full((3,), 1 + 2**-12) * 300)
    assert found.tolist() == [np.float32(1 + 2**-12) * 90000] * 3


def test_only_the_part_of_a_program_that_is_half_is_rounded() -> None:
    def body(mb: Any, x: Any) -> Any:
        return mb.add(x=mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), y=2.0**-12)

    (found,) = in_memory(body, VECTOR)(torch.full((3,), 1 + 2**-12))
    assert found.tolist() == [1 + 2**-12] * 3


def test_inputs_are_taken_in_the_type_that_is_declared() -> None:
    (found,) = in_memory(lambda mb, x: mb.mul(x=x, y=0.5), VECTOR)(torch.tensor([1, 2, 3], dtype=torch.uint8))
    assert found.tolist() == [0.5, 1, 1.5]
    (whole,) = in_memory(lambda mb, x: mb.add(x=x, y=np.int32(1)), VECTOR, dtype="int32")(torch.tensor([1, 2, 3]))
    assert whole.dtype == torch.int32


# The program


def test_lists_optional_inputs_and_several_outputs_survive_the_disk(tmp_path: Path) -> None:
    pair = np.array([[7, 8]], dtype=np.float16)

    def body(mb: Any, x: Any) -> Any:
        left, right = mb.split(x=mb.concat(values=[x, pair], axis=0), num_splits=2, axis=1)
        return right, mb.layer_norm(x=left, axes=[0], epsilon=np.float16(0.5)), left

    right, normal, left = saved(tmp_path, body, {"x": (2, 2)}, dtype="fp16")(torch.tensor([[1.0, 2], [3, 4]]))
    assert (left.tolist(), right.tolist()) == ([[1], [3], [7]], [[2], [4], [8]])
    expected = (left - left.mean()) / (left.var(correction=0) + 0.5).sqrt()
    torch.testing.assert_close(normal, expected, rtol=1e-3, atol=1e-3)


def test_an_output_may_be_read_by_other_operators_and_may_be_an_input() -> None:
    first, x, last = in_memory(lambda mb, x: (mb.relu(x=x, name="a"), x, mb.relu(x=x)), VECTOR)(torch.ones(3))
    assert first.tolist() == x.tolist() == last.tolist() == [1, 1, 1]

    def body(mb: Any, x: Any) -> Any:
        first = mb.mul(x=x, y=2.0)
        return first, mb.add(x=first, y=1.0)

    assert [found.tolist() for found in in_memory(body, VECTOR)(torch.ones(3))] == [[2] * 3, [3] * 3]


def test_a_program_runs_again_and_again() -> None:
    run = in_memory(chain, VECTOR)
    assert [run(torch.full((3,), value))[0].tolist() for value in (1.0, 2.0, 1.0)] == [[3] * 3, [5] * 3, [3] * 3]


def test_constant_subexpressions_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    original = OPERATORS["mul"]

    @functools.wraps(original)  # with its signature
    def counted(x: Tensor, y: Tensor) -> Any:
        calls.append(x)
        return original(x, y)

    monkeypatch.setitem(OPERATORS, "mul", counted)

    def body(mb: Any, x: Any) -> Any:
        weight = mb.mul(x=mb.const(val=np.array([1, 2, 3], np.float32)), y=2.0)
        return mb.add(x=x, y=mb.mul(x=weight, y=0.5))

    made = evaluator(body, VECTOR)
    assert len(calls) == 2
    watched: list[str] = []
    for _ in range(2):
        (found,) = made.run(
            {"x": torch.zeros(3)}, watch=lambda operation, *_: watched.append(operation.op_type)
        ).values()
        assert found.tolist() == [1, 2, 3]
    assert len(calls) == 2
    assert watched == ["add", "add"]


def test_only_constants_that_are_read_while_it_runs_are_kept(tmp_path: Path) -> None:
    """The float32 weight is kept, and its integers are not."""

    def body(mb: Any, x: Any) -> Any:
        data = np.array([[1, 2, 3]], dtype=np.int8)
        weight = mb.constexpr_blockwise_shift_scale(data=data, scale=np.array([[0.5]], np.float32))
        return mb.linear(x=x, weight=weight, bias=np.zeros(1, np.float32))

    package = coreml_package.read(save(tmp_path / "model.mlpackage", program(body, VECTOR)))
    made = Evaluator(package.operations, package.outputs)
    bias, weight = sorted(made._constants.values(), key=Tensor.dim)
    assert (bias.tolist(), weight.tolist()) == ([0], [[0.5, 1, 1.5]])
    assert weight.dtype == torch.float32


def test_a_value_is_freed_after_its_last_reader() -> None:
    seen: dict[str, weakref.ref[Tensor]] = {}
    alive: dict[str, set[str]] = {}

    def watch(operation: Any, name: str, value: Tensor) -> None:
        alive[operation.name] = {before for before, found in seen.items() if found() is not None}
        seen[name] = weakref.ref(value)

    def body(mb: Any, x: Any) -> Any:
        kept, _ = mb.split(x=x, num_splits=2, axis=0, name="split")  # nothing reads the second half
        first = mb.mul(x=kept, y=2.0, name="first")
        second = mb.mul(x=first, y=2.0, name="second")
        third = mb.add(x=second, y=first, name="third")
        return mb.mul(x=third, y=2.0, name="fourth")

    evaluator(body, {"x": (2,)}).run({"x": torch.ones(2)}, watch=watch)
    assert alive["second"] == {"first"}
    assert alive["third"] == {"first", "second"}
    assert alive["fourth"] == {"third"}


def test_a_classifier_gives_an_index_and_probabilities() -> None:
    def body(mb: Any, x: Any) -> Any:
        from coremltools.converters.mil.mil.operation import mil_list

        return mb.classify(probabilities=x, classes=mb.const(val=mil_list(["cat", "dog", "owl"])))

    label, probabilities = in_memory(body, {"x": (1, 3)})(torch.tensor([[0.1, 0.7, 0.2]]))
    assert int(label) == 1
    assert probabilities.flatten().tolist() == pytest.approx([0.1, 0.7, 0.2])


# Watching, and teacher forcing


def test_watch_sees_every_value_in_order_as_it_was_computed() -> None:
    seen: list[tuple[str, str, list[float]]] = []
    evaluator(chain, VECTOR).run(
        {"x": torch.tensor([-1.0, 0, 1])},
        watch=lambda operation, name, value: seen.append((operation.op_type, name, value.tolist())),
    )
    assert seen == [("relu", "first", [0, 0, 1]), ("mul", "second", [0, 0, 2]), ("add", "third", [1, 1, 3])]


def test_a_given_value_replaces_the_computed_one_for_all_that_follows() -> None:
    seen: dict[str, list[float]] = {}
    (found,) = (
        evaluator(chain, VECTOR)
        .run(
            {"x": torch.tensor([-1.0, 0, 1])},
            given={"first": torch.tensor([5.0, 6, 7]), "elsewhere": torch.zeros(1)},
            watch=lambda _, name, value: seen.update({name: value.tolist()}),
        )
        .values()
    )
    assert seen["first"] == [0, 0, 1]
    assert found.tolist() == [11, 13, 15]


def test_a_given_input_and_a_given_output_count() -> None:
    made, x = evaluator(chain, VECTOR), {"x": torch.ones(3)}
    assert made.run(x, given={"x": torch.full((3,), 2.0)})["third"].tolist() == [5] * 3
    assert made.run(x, given={"third": torch.zeros(3)})["third"].tolist() == [0] * 3


def test_a_given_value_is_not_rounded() -> None:
    made = evaluator(lambda mb, x: mb.add(x=mb.relu(x=x, name="first"), y=np.float16(-1)), VECTOR, dtype="fp16")
    (found,) = made.run({"x": torch.zeros(3)}, given={"first": torch.full((3,), 1 + 2**-12)}).values()
    assert found.tolist() == [2**-12] * 3


# What it refuses


def test_unknown_operators_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mul", "relu"):
        monkeypatch.delitem(OPERATORS, name)
    message = (
        "the reference evaluator does not support the operators mul, relu: run this package on a Mac, or implement "
        "the operators in targets/coreml/mil"
    )
    with pytest.raises(CheckFailed, match=f"^{re.escape(message)}$"):
        evaluator(chain, VECTOR)


def test_a_missing_input_is_reported_with_the_given_inputs() -> None:
    made = evaluator(lambda mb, x, y: mb.add(x=x, y=y), {"x": (3,), "image": (3,)})
    with pytest.raises(BadRequest, match=r"^the package has the inputs image, x; got x, y$"):
        made.run({"y": torch.ones(3), "x": torch.ones(3)})
    with pytest.raises(BadRequest, match=r"^the package has the inputs image, x; got none$"):
        made.run({})


@pytest.mark.parametrize("shape", [(4,), (1, 3), ()])
def test_an_input_with_a_wrong_shape_is_reported(shape: tuple[int, ...]) -> None:
    message = f"input x has shape {shape}; the package accepts (3)"
    with pytest.raises(BadRequest, match=f"^{re.escape(message)}$"):
        evaluator(chain, VECTOR).run({"x": torch.ones(shape)})


def test_a_size_that_the_package_leaves_open_may_be_any() -> None:
    from targets.coreml.conversion.workarounds import import_coremltools

    import_coremltools()
    from coremltools.converters.mil.mil import get_new_symbol

    made = evaluator(lambda mb, x: mb.relu(x=x), {"x": (get_new_symbol(), 2)})
    for size in (1, 5):
        (found,) = made.run({"x": torch.ones(size, 2)}).values()
        assert found.shape == (size, 2)
    with pytest.raises(BadRequest, match=re.escape("input x has shape (1, 3); the package accepts (any, 2)")):
        made.run({"x": torch.ones(1, 3)})


def test_an_operator_whose_output_has_a_wrong_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "relu", lambda x: x[:2])
    message = (
        "first (relu) was computed with shape (2,), but the package declares (3): a fault of targets/coreml/mil, or of "
        "the package"
    )
    with pytest.raises(CheckFailed, match=f"^{re.escape(message)}$"):
        evaluator(chain, VECTOR).run({"x": torch.ones(3)})


def test_an_operator_that_torch_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "relu", lambda x: x + torch.ones(2))
    with pytest.raises(
        CheckFailed, match=r"^the reference evaluator cannot compute first \(relu\): The size of tensor a"
    ):
        evaluator(chain, VECTOR).run({"x": torch.ones(3)})


def test_an_attribute_that_is_computed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def reshape(x: Tensor, *, shape: list[int]) -> Tensor:
        return x.reshape(shape)

    monkeypatch.setitem(OPERATORS, "reshape", reshape)
    message = (
        "moved (reshape) has a computed shape; the reference evaluator needs a constant: export the model with fixed "
        "sizes"
    )
    with pytest.raises(CheckFailed, match=f"^{re.escape(message)}$"):
        evaluator(
            lambda mb, x, y: mb.reshape(x=x, shape=y, name="moved"),
            {"x": (3,), "y": (2,)},
            dtype={"x": "fp32", "y": "int32"},
        )


@pytest.mark.parametrize("store", [False, True])
def test_an_output_may_be_a_constant_of_any_form(store: bool, tmp_path: Path) -> None:
    """For example anchors, beside values computed from them."""

    def body(mb: Any, x: Any) -> Any:
        anchors = mb.const(val=np.array([[1.0, 2.0]], np.float32), name="anchors")
        count = mb.const(val=np.int32(7), name="count")
        doubled = mb.mul(x=anchors, y=np.float32(2), name="doubled")
        return mb.add(x=x, y=anchors), anchors, count, doubled

    made = saved(tmp_path, body, {"x": (1, 2)}) if store else in_memory(body, {"x": (1, 2)})
    found = made(torch.tensor([[10.0, 20.0]]))
    assert [value.tolist() for value in found] == [[[11, 22]], [[1, 2]], 7, [[2, 4]]]


def test_an_output_may_be_the_input_itself() -> None:
    found = in_memory(lambda mb, x: (x, mb.relu(x=x)), VECTOR)(torch.tensor([-1.0, 0.0, 2.0]))
    assert [value.tolist() for value in found] == [[-1, 0, 2], [0, 0, 2]]
