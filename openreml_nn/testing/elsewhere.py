"""A device that is not there, so that code for a GPU can be tried without one.

Its tensors say that they are on another device and keep their numbers on the CPU, where every operation is computed.
What a GPU would refuse, an operation on tensors of two devices, is an error here too; what makes the host wait for a
GPU, each number that Python looks at, is counted. Results are those of the CPU to the last bit, and nothing is said of
the arithmetic of a GPU.
"""

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

DEVICE = "lazy"  # a device that torch knows on every machine and that has no tensors of its own
MOVES = {"_to_copy", "to", "copy_"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
SCALARS = {"fill_", "masked_fill", "masked_fill_", *INDEXING}  # take a number from the CPU, as elementwise ones do
CHECKED = {"_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq", "cholesky_inverse"}
DEPENDS_ON_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
PACKAGE, TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)


class TwoDevices(RuntimeError):
    """An operation on tensors of two devices, which a GPU refuses."""


class ElsewhereTensor(Tensor):
    """A tensor on the device that is not there; made by `Elsewhere`.

    Attributes:
        here: Its numbers.
    """

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "ElsewhereTensor":
        options: dict[str, Any] = {"dtype": here.dtype, "layout": here.layout, "device": torch.device(DEVICE, 0)}
        if here.layout == torch.strided:
            options |= {"strides": here.stride(), "storage_offset": here.storage_offset()}
        with torch.inference_mode(False):  # torch cannot make views of this kind in inference mode
            there = Tensor._make_wrapper_subclass(cls, here.shape, **options)
        there.here = here
        return there

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} on a tensor of `Elsewhere` outside of its `with` block.")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.here.__reduce_ex__(protocol)

    def __format__(self, form: str) -> str:
        return format(self.item() if not self.ndim else str(self), form)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.here!r} elsewhere"


class Elsewhere(TorchDispatchMode):
    """Within ``with Elsewhere() as device:`` tensors and modules may be moved to ``device.name``.

    Attributes:
        name: Name of the device.
        reads: Where the host waited for numbers from the device, and by which operation.
        checks: Where an operation of linear algebra looked at its own success, for which the host waits too.
        writes: Where numbers went from the host to the device.

    Example:
        >>> import torch
        >>> from openreml_nn.testing.elsewhere import Elsewhere
        >>> with Elsewhere() as device:
        ...     x = torch.ones(3, device=device.name)
        ...     print(bool(x.sum() > 2), len(device.reads))
        True 1
    """

    name = DEVICE

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.checks: list[str] = []
        self.writes: list[str] = []

    @staticmethod
    def works() -> bool:
        """Whether this version of torch takes such a device."""
        try:
            torch.Stream(device=DEVICE)
        except RuntimeError as error:
            return "not linked" not in str(error)
        return True

    def forget(self) -> None:
        """Count from 0 again."""
        self.reads, self.checks, self.writes = [], [], []

    def __enter__(self) -> "Elsewhere":
        self._threads = torch.autograd.set_multithreading_enabled(False)  # torch has no thread for this device
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # constants come through here on their way to the device
        self._overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `data` of such a tensor cannot be replaced
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrites)
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        self._threads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors(args)) + list(_tensors(tuple(kwargs.values())))
        there, target = [x for x in tensors if _is_there(x)], kwargs.get("device")
        to_there = bool(there) if target is None else torch.device(target).type == DEVICE
        if not there and not to_there:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in MOVES:
            to_there = _is_there(args[0]) if name == "copy_" else to_there
            if to_there and not _is_there(args[name == "copy_"]):
                self._note(self.writes, name)
            elif not to_there and str(target) != "meta":
                self._note(self.reads, name)
        else:
            self._look(func, name, args, kwargs, [x for x in tensors if not _is_there(x)])
        if name == "_efficientzerotensor":  # zeros without memory, which only torch itself can multiply
            func = torch.ops.aten.zeros.default
        if target is not None and to_there:
            kwargs = kwargs | {"device": "cpu"}
        result = func(*_here(args), **{key: _here(value) for key, value in kwargs.items()})
        if to_there:
            result = tree_map_only(Tensor, ElsewhereTensor, result)
        comes_from_here = name in ("_to_copy", "to") and not _is_there(args[0])
        if comes_from_here or (not to_there and name != "copy_"):  # a tensor of its own, no view
            return result
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _look(self, operation: Any, name: str, args: Any, kwargs: Any, here: list[Tensor]) -> None:
        """Refuse what mixes devices, and note what the host waits for."""
        elementwise = torch.Tag.pointwise in operation.tags or name in SCALARS
        indices = [x for x in args[1] if isinstance(x, Tensor)] if name in INDEXING else []
        if name in INDEXING and _is_there(args[0]):
            if any(not _is_there(x) for x in indices):
                self._note(self.writes, name)
            here = [x for x in here if not any(x is index for index in indices)]
        if any(not elementwise or x.ndim for x in here):
            both = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in here)
            raise TwoDevices(f"{operation} takes tensors elsewhere and here; here are {both}.")
        if name in INDEXING:
            waits = any(x.dtype == torch.bool for x in indices) and (len(args) < 3 or args[2].ndim > 0)
        elif name == "repeat_interleave":
            waits = kwargs.get("output_size") is None
        else:
            waits = any(tag in operation.tags for tag in DEPENDS_ON_VALUES)
        if name in CHECKED:
            self._note(self.checks, name)
        elif waits:
            self._note(self.reads, name)

    @staticmethod
    def _note(events: list[str], name: str) -> None:
        """Add an event with the line that it comes from, of this package if there is one, else outside of torch."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        own = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
        at = (own or [frame for frame in frames if not frame.filename.startswith(TORCH)])[-1]
        events.append(f"{name} at {'/'.join(Path(at.filename).parts[-2:])}:{at.lineno}: {at.line}")


def _is_there(x: Any) -> bool:
    return isinstance(x, ElsewhereTensor)


def _here(x: Any) -> Any:
    """An argument of an operation with the numbers in the place of tensors elsewhere."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(_here, x))
    return x.here if isinstance(x, ElsewhereTensor) else x


def _tensors(x: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of an operation."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from _tensors(part)
