"""Laws of the module: names, dictionaries, fixed parameters, copies, dtypes and devices."""

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from openreml_nn.testing import values
from openreml_nn.testing.case import Case, require, require_close, require_raises
from openreml_nn.testing.elsewhere import DEVICE, Elsewhere


def names(case: Case, theta: Tensor) -> None:
    """Names, ``nn.Parameter``s and the indices of ``leaves`` are as many, each once, and registered."""
    V = case.matrix
    own = V.theta_parameters()
    require(len(set(V.param_names)) == len(V.param_names), f"`param_names` repeat: {V.param_names}")
    require(V.num_params == len(V.param_names) == len(own), "the numbers of names and of `nn.Parameter`s differ")
    registered = {id(p) for p in V.parameters()}
    require(all(id(p) in registered for p in own), "a theta is not among the module's parameters")
    covered = sorted(i for _, _, index in V.leaves() for i in index)
    require(sorted(set(covered)) == list(range(V.num_params)), f"`leaves` covers the parameters {covered}")


def dictionaries(case: Case, theta: Tensor) -> None:
    """A dictionary in any order stands for the flat tensor; keys that are missing or unknown are refused."""
    V = case.matrix
    given = V.to_param_dict(theta)
    require(list(given) == V.param_names, f"`to_param_dict` has the keys {list(given)}")
    require_close(V(dict(reversed(given.items()))), V(theta), "the matrix at a dictionary", tolerance=0.0)
    if V.num_params:
        require_close(V.from_param_dict(given), theta, "`from_param_dict`", tolerance=0.0)
        missing = {name: value for name, value in given.items() if name != V.param_names[0]}
        require_raises(ValueError, lambda: V(missing), "a dictionary without a parameter")
    require_raises(ValueError, lambda: V(given | {"no such parameter": theta.new_zeros(1)}), "an unexpected key")
    require_raises(ValueError, lambda: V(theta.new_zeros(V.num_params + 1)), "a parameter too many")


def fixed_parameters(case: Case, theta: Tensor) -> None:
    """``no_grad_index`` and ``requires_grad`` are one fact, and what is refused changes nothing."""
    V = copy.deepcopy(case.matrix)
    everything = list(range(V.num_params))
    for i in everything:
        V.set_no_grad(index=i)
        flags = [p.requires_grad for p in V.theta_parameters()]
        require(V.no_grad_index == [i], f"after `set_no_grad({i})` the index is {V.no_grad_index}")
        require(flags == [k != i for k in everything], f"after `set_no_grad({i})` `requires_grad` is {flags}")
        require_raises(ValueError, lambda i=i: V.set_no_grad([i, V.num_params]), "an index out of range")  # type: ignore[misc]
        require_raises(KeyError, lambda: V.set_no_grad(param_name="no such parameter"), "an unknown name")
        require(V.no_grad_index == [i], "a refused `set_no_grad` changes what is fixed")
        V.theta_parameters()[i].requires_grad = True
        require(V.no_grad_index == [], "`requires_grad = True` leaves the parameter fixed")
        V.set_no_grad(param_name=V.param_names[i])
        require(V.no_grad_index == [i], f"after `set_no_grad` by name the index is {V.no_grad_index}")
        require_close(V(theta), case.matrix(theta), "the matrix with a fixed parameter", tolerance=0.0)
    V.requires_grad_(False)
    require(V.no_grad_index == everything, "`requires_grad_(False)` leaves a parameter free")
    require(V.grad(theta) == (None, []), "`grad` of a fixed matrix is not (None, [])")
    V.set_no_grad([])
    require(V.no_grad_index == [], "`set_no_grad([])` leaves a parameter fixed")


def copies(case: Case, theta: Tensor) -> None:
    """Deep copies and pickles are equal and independent, and do not carry what ``set_intermediates`` kept."""
    V = copy.deepcopy(case.matrix)
    V.set_theta(theta)
    V.set_no_grad(list(range(V.num_params))[:1])
    V.set_intermediates(theta, "kept")
    require(V.get_intermediates(theta) == ("kept" if V.num_params else None), "`get_intermediates` lost what was kept")
    for how, twin in (("deepcopy", copy.deepcopy(V)), ("pickle", pickle.loads(pickle.dumps(V)))):
        require_close(twin(), V(), f"the matrix after {how}", tolerance=0.0)
        require(twin.no_grad_index == V.no_grad_index, f"{how} changes what is fixed")
        require(twin.param_names == V.param_names, f"{how} changes the names")
        require(twin.get_intermediates(theta) is None, f"{how} carries the cache")
        twin.set_theta(theta + 1.0)
        require(torch.equal(V.theta, theta.to(V.theta.dtype)), f"{how} shares its parameters")


def state(case: Case, theta: Tensor) -> None:
    """``state_dict`` brings the matrix back, by ``torch.load`` without code, and has nothing of the cache."""
    V, other = copy.deepcopy(case.matrix), copy.deepcopy(case.matrix)
    V.set_theta(theta)
    V.set_intermediates(theta, "kept")
    require(V.state_dict().keys() == other.state_dict().keys(), "the cache is in `state_dict`")
    file = io.BytesIO()
    torch.save(V.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    require_close(other(), V(), "the matrix after `load_state_dict`", tolerance=0.0)


def dtypes(case: Case, theta: Tensor) -> None:
    """The matrix has the dtype of its parameters, also after ``float()`` and ``double()``."""
    V, single = copy.deepcopy(case.matrix), case.matrix(theta.float())
    require(single.dtype == torch.float32, f"float32 parameters give a matrix of {single.dtype}")
    require_close(single, V(theta), "the matrix in float32", tolerance=1e-3)
    for cast, dtype in (("float", torch.float32), ("double", torch.float64)):
        V = getattr(V, cast)()
        require(all(p.dtype == dtype for p in V.theta_parameters()), f"`{cast}()` leaves thetas of another dtype")
        require(V(theta.to(dtype)).dtype == dtype, f"after `{cast}()` the matrix has another dtype")
        if V.num_params:
            require(V().dtype == dtype, f"after `{cast}()` the matrix at the module's own thetas has another dtype")


def devices(case: Case, theta: Tensor) -> None:
    """Moved to the first CUDA device, or where there is none to one that is not there (`Elsewhere`), and back."""
    if theta.device.type == DEVICE:
        return
    with _another_device() as name:
        if name is None:
            return
        there = theta.to(name)
        moved = replace(case, matrix=copy.deepcopy(case.matrix).to(name), thetas=case.thetas.to(name))
        V = moved.matrix(there)
        require(V.device == there.device, "the matrix is not on the device of its parameters")
        require_close(V.cpu(), case.matrix(theta).cpu(), "the matrix on another device")
        for law in (values.products, values.elements, values.in_place_sum):
            law(moved, there)
        require_close(moved.matrix.to(theta.device)(theta), case.matrix(theta), "the matrix moved back", tolerance=0.0)


@contextmanager
def _another_device() -> Iterator[str | None]:
    """The name of a device that is not the CPU; None where there is none to be had."""
    if torch.cuda.is_available():
        yield "cuda"
    elif Elsewhere.works():
        with Elsewhere() as device:
            yield device.name
    else:
        yield None
