"""Untrusted checkpoints: valid files are read, each kind of invalid file has its own error, and no code is run."""

from __future__ import annotations

import argparse
import builtins
import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file, save_model
from torch import Tensor, nn

from models import checkpoint
from models.errors import BadRequest

State = dict[str, Tensor]

DAMAGED = "WEIGHTS={path} is not a PyTorch checkpoint, or is damaged; copy it again"
PICKLED = (
    "WEIGHTS={path} holds pickled Python objects, which could run code when loaded, and is refused; save "
    "only model.state_dict(), or convert it to safetensors on a machine where you trust it"
)
STATELESS = "WEIGHTS={path} holds no state dict: expected tensors by name, as model.state_dict() gives"


def network(classes: int = 5) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def exactly(sentence: str, path: Path) -> str:
    return f"^{re.escape(sentence.replace('{path}', str(path)))}$"


def torch_bytes(content: object, *, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@pytest.fixture
def state() -> State:
    return network().state_dict()


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- Files that are whole -------------------------------------------------------------------------------------------


def test_safetensors_come_back(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "w.safetensors")
    assert_same(checkpoint.read(tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
def test_torch_files_of_both_formats_come_back(tmp_path: Path, state: State, zipped: bool, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(torch_bytes(state, zipped=zipped))
    assert_same(checkpoint.read(path), state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "state_dict_ema", "model_ema"])
def test_wrappers_of_training_scripts_are_removed(tmp_path: Path, state: State, wrapper: str) -> None:
    torch.save({"epoch": 7, wrapper: state, "optimizer": {"lr": 0.1}}, tmp_path / "w.pt")
    assert_same(checkpoint.read(tmp_path / "w.pt"), state)


@pytest.mark.parametrize(
    "wrapper", ["state_dict", "model", "model_state_dict", "net", "network", "weights", "my_own", "ema", "model_ema"]
)
def test_the_key_of_the_weights_is_reported(tmp_path: Path, state: State, wrapper: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 7, wrapper: state, "optimizer": optimizer}, tmp_path / "w.pt")
    found = checkpoint.stored(tmp_path / "w.pt")
    assert_same(found.tensors, state)
    assert (found.key, found.others) == (wrapper, ())


def test_weights_two_levels_down_are_found(tmp_path: Path, state: State) -> None:
    torch.save({"checkpoint": {"epoch": 1, "model": state}}, tmp_path / "w.pt")
    assert checkpoint.stored(tmp_path / "w.pt").key == "checkpoint.model"


AVERAGED = ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "swa_model", "averaged_model", "shadow"]


@pytest.mark.parametrize("plain", ["state_dict", "model", "net", "model_state_dict"])
@pytest.mark.parametrize("averaged", AVERAGED)
def test_plain_weights_are_loaded_and_averaged_ones_are_named(
    tmp_path: Path, state: State, plain: str, averaged: str
) -> None:
    path, means = tmp_path / "w.pt", {name: tensor + 1 for name, tensor in state.items()}
    torch.save({averaged: means, plain: state}, path)
    model = network()
    loaded = checkpoint.load(model, path)
    assert_same(model.state_dict(), state)
    assert str(loaded) == (
        f"loaded 9 tensors of {path}, under `{plain}`; the file also holds averaged weights under `{averaged}`, which "
        f"WEIGHTS={path}#{averaged} loads"
    )
    loaded = checkpoint.load(model, path, averaged)
    assert_same(model.state_dict(), means)
    assert (loaded.key, loaded.others) == (averaged, (plain,))


def test_averaged_weights_alone_are_taken(tmp_path: Path, state: State) -> None:
    torch.save({"epoch": 7, "state_dict_ema": state}, tmp_path / "w.pt")
    assert checkpoint.stored(tmp_path / "w.pt").key == "state_dict_ema"


def test_a_missing_key_is_refused_with_the_existing_keys(tmp_path: Path, state: State) -> None:
    path = tmp_path / "w.pt"
    torch.save({"state_dict": state, "model_ema": state}, path)
    sentence = "WEIGHTS={path}#ema: the file has no weights under `ema`; it holds `state_dict`, `model_ema`"
    with pytest.raises(BadRequest, match=exactly(sentence, path)):
        checkpoint.stored(path, "ema")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BadRequest, match=r"#ema: a safetensors file holds one state dict; leave `#ema` out$"):
        checkpoint.stored(tmp_path / "w.safetensors", "ema")


def test_of_several_networks_one_must_be_named(tmp_path: Path, state: State) -> None:
    path = tmp_path / "w.pt"
    torch.save({"first": state, "second": state}, path)
    sentence = "WEIGHTS={path} holds several state dicts: `first`, `second`; choose one, as in WEIGHTS={path}#first"
    with pytest.raises(BadRequest, match=exactly(sentence, path)):
        checkpoint.stored(path)
    assert checkpoint.stored(path, "second").key == "second"


def test_a_file_may_have_the_mark_of_keys_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a#b.pt").touch()
    assert checkpoint.split(f"{tmp_path}/a#b.pt") == (f"{tmp_path}/a#b.pt", "")
    assert checkpoint.split(f"{tmp_path}/a#b.pt#model") == (f"{tmp_path}/a#b.pt", "model")
    assert checkpoint.split("w.pt#model.ema") == ("w.pt", "model.ema")
    for text in ("w.pt", "#key", "w.pt#", "#", "", "timm"):
        assert checkpoint.split(text) == (text, "")


PREFIXES = ["module.", "model.", "_orig_mod.", "net.", "module._orig_mod.", "_orig_mod.module.", "a.b.c.", "0."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_prefix_of_all_keys_is_taken_off(tmp_path: Path, state: State, suffix: str, prefix: str) -> None:
    prefixed = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(save(prefixed) if suffix == "safetensors" else torch_bytes({"state_dict": prefixed}))
    model = network()
    loaded = checkpoint.load(model, path)
    assert_same(model.state_dict(), state)
    assert loaded.prefix == prefix and f", without their prefix `{prefix}`" in str(loaded)


class Inside(nn.Module):
    """A network with a submodule whose name wrappers use too."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, network())


@pytest.mark.parametrize("name", ["module", "model", "net", "_orig_mod", "state_dict_"])
@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod.module."])
def test_a_part_that_is_called_like_a_wrapper_keeps_its_name(name: str, wrapped: str) -> None:
    state = Inside(name).state_dict()
    model = Inside(name)
    checkpoint.load_into(model, {f"{wrapped}{key}": tensor for key, tensor in state.items()}, FILE)
    assert_same(model.state_dict(), state)


def test_the_counter_of_stochastic_weight_averaging_is_no_weight(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(network())
    torch.save(averaged.state_dict(), tmp_path / "w.pt")
    model = network()
    assert checkpoint.load(model, tmp_path / "w.pt").prefix == "module."
    assert_same(model.state_dict(), averaged.module.state_dict())


def test_the_counters_of_a_profiler_are_no_weights(state: State) -> None:
    counters = {"total_ops": torch.zeros(1), "0.total_params": torch.zeros(1, dtype=torch.float64)}
    model = network()
    checkpoint.load_into(model, {**state, **counters}, FILE)
    assert_same(model.state_dict(), state)


def test_other_tensors_of_a_lightning_module_are_skipped_and_named(tmp_path: Path, state: State) -> None:
    content = {f"model.{name}": tensor for name, tensor in state.items()} | {"criterion.weight": torch.ones(5)}
    torch.save({"state_dict": content, "pytorch-lightning_version": "2.5.0"}, tmp_path / "w.ckpt")
    model = network()
    loaded = checkpoint.load(model, tmp_path / "w.ckpt")
    assert_same(model.state_dict(), state)
    assert str(loaded).endswith("; 1 tensors outside `model.` were passed over: `criterion.weight`")


def test_prefixes_of_torch_compile_are_removed_at_any_position(state: State) -> None:
    inserted = {re.sub(r"^([03])\.", r"\1._orig_mod.", name): tensor for name, tensor in state.items()}
    model = network()
    checkpoint.load_into(model, {f"model.{name}": tensor for name, tensor in inserted.items()}, FILE)
    assert_same(model.state_dict(), state)


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def test_a_twin_that_safetensors_leaves_out_is_filled(tmp_path: Path) -> None:
    source, model = Tied(), Tied()
    save_model(source, str(tmp_path / "w.safetensors"))
    assert checkpoint.read(tmp_path / "w.safetensors").keys() == {"first.weight", "first.bias", "second.bias"}
    checkpoint.load(model, tmp_path / "w.safetensors")
    assert_same(model.state_dict(), source.state_dict())
    for left in ("first.weight", "second.weight"):
        kept = {name: tensor for name, tensor in source.state_dict().items() if name != left}
        model = Tied()
        checkpoint.load_into(model, kept, FILE)
        assert_same(model.state_dict(), source.state_dict())


def test_twins_that_differ_are_refused() -> None:
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    checkpoint.load_into(Tied(), state, FILE)
    with pytest.raises(
        BadRequest, match=r"`first\.weight` and `second\.weight` differ, but are the same tensor in this"
    ):
        checkpoint.load_into(Tied(), {**state, "second.weight": torch.zeros(4, 4)}, FILE)


def test_half_precision_weights_are_loaded_as_float32(tmp_path: Path, state: State) -> None:
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    model = network()
    checkpoint.load_into(model, checkpoint.read(tmp_path / "w.safetensors"), tmp_path)
    weight = model.get_parameter("0.weight")
    assert weight.dtype == torch.float32 and torch.equal(weight, state["0.weight"].half().float())


# --- Files that are not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none.pt", "folder"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    sentence = "WEIGHTS={path}: there is no such file; give a .safetensors, .pt or .pth checkpoint"
    with pytest.raises(BadRequest, match=exactly(sentence, path)):
        checkpoint.read(path)


def test_a_torch_file_that_ends_early_is_damaged_wherever_it_ends(tmp_path: Path, state: State) -> None:
    whole, path = torch_bytes(state), tmp_path / "w.pt"
    for end in range(0, len(whole), 29):
        path.write_bytes(whole[:end])
        with pytest.raises(BadRequest, match=exactly(DAMAGED, path)):
            checkpoint.read(path)


def test_a_torch_file_of_the_old_format_that_ends_early_is_damaged(tmp_path: Path, state: State) -> None:
    whole, path = torch_bytes(state, zipped=False), tmp_path / "w.pt"
    for end in range(0, len(whole), 29):
        path.write_bytes(whole[:end])
        # Cut inside the name of a class, it asks for a class that nobody knows.
        with pytest.raises(BadRequest, match=f"{exactly(DAMAGED, path)}|{exactly(PICKLED, path)}"):
            checkpoint.read(path)
    for missing in (1, 50, 100, 400):  # all of them in the weights
        path.write_bytes(whole[:-missing])
        with pytest.raises(BadRequest, match=exactly(DAMAGED, path)):
            checkpoint.read(path)


def test_safetensors_that_end_early_are_damaged_wherever_they_end(tmp_path: Path, state: State) -> None:
    whole, path = save(state), tmp_path / "w.safetensors"
    sentence = rf"^WEIGHTS={re.escape(str(path))} is not a complete safetensors file \(.+\); copy it again$"
    for end in range(0, len(whole), 29):
        path.write_bytes(whole[:end])
        with pytest.raises(BadRequest, match=sentence):
            checkpoint.read(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"import os\n", b'{"weights": [1, 2]}', b"\x89PNG\r\n\x1a\n" + bytes(99), bytes(999)]
)
def test_a_file_of_a_different_format_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(BadRequest, match=exactly(DAMAGED, path)):
        checkpoint.read(path)


class Trap:
    """An object whose unpickling would call `builtins.edgeline_trap`."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        found: Callable[[], None] = vars(builtins)["edgeline_trap"]
        return found, ()


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def edgeline_trap() -> None:
        calls.append("ran")

    edgeline_trap.__module__, edgeline_trap.__qualname__ = "builtins", "edgeline_trap"
    monkeypatch.setattr(builtins, "edgeline_trap", edgeline_trap, raising=False)
    path = tmp_path / "w.pt"
    for content in (
        torch_bytes({"state_dict": Trap()}),
        torch_bytes({"state_dict": Trap()}, zipped=False),
        pickle.dumps(Trap()),
    ):
        path.write_bytes(content)
        with pytest.raises(BadRequest, match=exactly(PICKLED, path)):
            checkpoint.read(path)
    assert not calls
    pickle.loads(content)  # the trap is a real one
    assert calls == ["ran"]


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(network(), path)
    with pytest.raises(BadRequest, match=exactly(PICKLED, path)):
        checkpoint.read(path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {}, {"epoch": 3}, {"model": {"lr": 0.1}}])
def test_tensors_without_names_are_no_state_dict(tmp_path: Path, content: object) -> None:
    path = tmp_path / "w.pt"
    torch.save(content, path)
    with pytest.raises(BadRequest, match=exactly(STATELESS, path)):
        checkpoint.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_one_value_that_is_not_finite_is_enough(tmp_path: Path, state: State, value: float, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    state["1.running_var"][2] = value
    path.write_bytes(save(state) if suffix == "safetensors" else torch_bytes(state))
    sentence = (
        "WEIGHTS={path}: `1.running_var` holds NaN or infinite values; the training diverged: use an earlier checkpoint"
    )
    with pytest.raises(BadRequest, match=exactly(sentence, path)):
        checkpoint.read(path)


# --- Into a model ---------------------------------------------------------------------------------------------------

FILE = Path("w.pt")


def test_a_checkpoint_of_the_model_fills_all_of_it(state: State) -> None:
    model = network()
    assert checkpoint.load_into(model, {name: tensor + 1 for name, tensor in state.items()}, FILE) == ()
    assert_same(model.state_dict(), {name: tensor + 1 for name, tensor in state.items()})


def test_batch_counters_may_be_missing(state: State) -> None:
    del state["1.num_batches_tracked"]
    assert checkpoint.load_into(network(), state, FILE) == ()


def test_missing_keys_are_named(state: State) -> None:
    sentence = "WEIGHTS={path} is not a checkpoint of this model: it lacks 0.weight; it holds 8 tensors: "
    sentence += "`0.bias`, `1.weight`, `1.bias` and 5 more; check MODEL"
    del state["0.weight"]
    with pytest.raises(BadRequest, match=exactly(sentence, FILE)):
        checkpoint.load_into(network(), state, FILE)


def test_the_first_three_of_many_missing_keys_are_named() -> None:
    sentence = (
        "WEIGHTS={path} is not a checkpoint of this model: it lacks 0.bias, 0.weight, 1.bias and 5 more; it holds 1 "
        "tensors: `stem?[31m.gamma`; check MODEL"
    )
    with pytest.raises(BadRequest, match=exactly(sentence, FILE)):
        checkpoint.load_into(network(), {"stem\x1b[31m.gamma": torch.zeros(1)}, FILE)


def test_unknown_keys_are_named(state: State) -> None:
    sentence = "WEIGHTS={path} is not a checkpoint of this model: it has unknown 9.weight; it holds 10 tensors: "
    sentence += "`0.weight`, `0.bias`, `1.weight` and 7 more; check MODEL"
    with pytest.raises(BadRequest, match=exactly(sentence, FILE)):
        checkpoint.load_into(network(), {**state, "9.weight": torch.zeros(1)}, FILE)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [("0.weight", (4, 3, 5, 5), "(4, 3, 3, 3)"), ("0.bias", (8,), "(4,)"), ("3.weight", (5, 9), "(5, 4)")],
)
def test_a_different_shape_is_named(state: State, name: str, shape: tuple[int, ...], expected: str) -> None:
    sentence = f"WEIGHTS={{path}}: `{name}` has shape {shape}, this model expects {expected}; check MODEL"
    with pytest.raises(BadRequest, match=exactly(sentence, FILE)):
        checkpoint.load_into(network(), {**state, name: torch.zeros(shape)}, FILE)


def test_a_refused_checkpoint_leaves_the_model_as_it_was(state: State) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BadRequest):
        checkpoint.load_into(model, {**state, "0.bias": torch.zeros(8)}, FILE)
    assert_same(model.state_dict(), before)


def test_a_different_number_of_classes_leaves_only_the_head_to_train(state: State) -> None:
    model = network(classes=9)
    before = model.get_parameter("3.weight").clone()
    assert checkpoint.load_into(model, state, FILE, head={"3.bias", "3.weight"}) == ("3.bias", "3.weight")
    assert torch.equal(model.get_parameter("3.weight"), before)
    assert torch.equal(model.get_parameter("0.weight"), state["0.weight"])


@pytest.mark.parametrize("suffix", ["pt", "SAFETENSORS"])
def test_a_prefix_of_some_keys_is_none(tmp_path: Path, state: State, suffix: str) -> None:
    twice = {**state, "module.0.bias": torch.zeros(4)}
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(save(twice) if suffix == "SAFETENSORS" else torch_bytes(twice))
    with pytest.raises(BadRequest, match=r"it has unknown module\.0\.bias; it holds 10 tensors"):
        checkpoint.load(network(), path)


FOREIGN = checkpoint.Format(name="somebody", signature=r"first\.weight", renames=((r"^(first|front)\.", "0."),))


def test_two_keys_that_become_one_name_are_refused(state: State) -> None:
    foreign = {re.sub(r"^0\.", "first.", name): tensor for name, tensor in state.items()}
    assert checkpoint.load_into(network(), foreign, FILE, formats=[FOREIGN]) == ()
    with pytest.raises(BadRequest, match=r"`first\.bias` and `front.bias` are the same tensor under two names"):
        checkpoint.load_into(network(), {**foreign, "front.bias": torch.zeros(4)}, FILE, formats=[FOREIGN])


def test_a_missing_tensor_of_a_foreign_file_is_reported_by_our_name(state: State) -> None:
    foreign = {re.sub(r"^0\.", "first.", name): tensor for name, tensor in state.items()}
    del foreign["first.bias"]
    with pytest.raises(
        BadRequest, match=r"\(in the format of somebody\) .* it lacks 0.bias, in Edgeline's names; it holds 8 tensors"
    ):
        checkpoint.load_into(network(), foreign, FILE, formats=[FOREIGN])


HEAD = {"3.bias", "3.weight"}


@pytest.mark.parametrize(
    ("bias", "weight"),
    [((), (9, 4)), ((0,), (0, 4)), ((7,), (9, 4)), ((7,), (5, 4)), ((9,), (9, 6)), ((9, 1), (9, 4))],
)
def test_a_head_that_does_not_fit_together_is_no_head_for_other_classes(
    state: State, bias: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    bent = {**state, "3.bias": torch.zeros(bias), "3.weight": torch.zeros(weight)}
    with pytest.raises(BadRequest, match=r"`3\.(bias|weight)` has shape"):
        checkpoint.load_into(network(), bent, FILE, head=HEAD)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_other_types_are_refused(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    path = tmp_path / "w.pt"
    torch.save({**state, "0.bias": torch.ones(4).to(dtype)}, path)
    with pytest.raises(BadRequest, match=rf"`0.bias` is a {dtype}, expected plain numbers"):
        checkpoint.read(path)


# torch calls these kinds of tensors unfinished or outdated; checkpoints have them.
@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor, :UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning",
    "ignore:Sparse CSR tensor support is in beta state:UserWarning",
)
@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.zeros(4, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(4), 1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda: torch.eye(4).to_sparse_csr(),
    ],
    ids=["sparse", "meta", "quantized", "nested", "jagged", "csr"],
)
def test_tensors_that_hold_no_plain_numbers_are_refused(
    tmp_path: Path, state: State, tensor: Callable[[], Tensor]
) -> None:
    path = tmp_path / "w.pt"
    torch.save({**state, "0.bias": tensor()}, path)
    with pytest.raises(
        BadRequest, match=r"`0\.bias` is a nested, meta, sparse or quantized|not a PyTorch checkpoint|pickled"
    ):
        checkpoint.read(path)


def test_a_value_beyond_float32_is_infinite(tmp_path: Path, state: State) -> None:
    path = tmp_path / "w.pt"
    torch.save({**state, "0.bias": torch.full((4,), 1e300, dtype=torch.float64)}, path)
    with pytest.raises(BadRequest, match=r"`0\.bias` holds NaN or infinite values"):
        checkpoint.read(path)


def test_integers_are_no_weights(state: State) -> None:
    with pytest.raises(BadRequest, match=r"`0.bias` holds torch.int8, expected floating-point numbers"):
        checkpoint.load_into(network(), {**state, "0.bias": torch.ones(4, dtype=torch.int8)}, FILE)


def test_the_options_of_a_training_script_beside_the_weights_are_passed_over(tmp_path: Path, state: State) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1, model="tiny"), "epoch": 3}, path)
    assert_same(checkpoint.read(path), state)


# --- More numbers than the file has ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(3, 1).expand(3, 10**10),
        torch.zeros(8).as_strided((4, 4), (1, 1)),
        torch.zeros(4).as_strided((4,), (0,)).expand(5, 4),
    ],
    ids=["expanded", "one side", "overlapping", "both"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_with_overlapping_memory_is_refused(
    tmp_path: Path, state: State, tensor: Tensor, zipped: bool
) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(torch_bytes({**state, "0.bias": tensor}, zipped=zipped))
    assert path.stat().st_size < 20_000
    with pytest.raises(
        BadRequest, match=r"`0\.bias` of shape \(.*\) is an expanded view with fewer numbers stored; save `tens"
    ):
        checkpoint.read(path)


def test_many_views_of_few_numbers_are_refused(tmp_path: Path) -> None:
    shared = torch.zeros(10**6)
    path = tmp_path / "w.pt"
    torch.save({f"{index}": shared for index in range(30)}, path)
    with pytest.raises(BadRequest, match=r"its 30 tensors have 120 MB and share 4 MB of storage"):
        checkpoint.read(path)
    torch.save({f"{index}": shared for index in range(5)}, path)  # tied weights, or views of one buffer
    assert len(checkpoint.read(path)) == 5


def test_a_zip_file_that_inflates_is_refused_unread(tmp_path: Path) -> None:
    plain, path = torch_bytes({"0.weight": torch.zeros(10**7)}), tmp_path / "w.pt"
    with zipfile.ZipFile(io.BytesIO(plain)) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert path.stat().st_size < 10**5
    with pytest.raises(BadRequest, match=r"is a compressed zip file of 0\.0 MB that would become 40 MB; save it with"):
        checkpoint.read(path)


def test_a_safetensors_file_of_numbers_that_torch_does_not_have_is_damaged(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(BadRequest, match="is not a complete safetensors file"):
        checkpoint.read(path)
