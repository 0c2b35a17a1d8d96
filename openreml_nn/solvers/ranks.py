r"""Processes that share the rows of one problem: the one place with collectives of ``torch.distributed``.

Each process has rows of its own, computes its part of a sum, and goes on with the sum over all. What follows is then
one number that every process holds, not a number for each. Automatic differentiation is told so by two operations, each
of which is the derivative of the other: ``sum`` adds up over the processes and passes a gradient on as it is,
``shared`` passes a value on as it is and adds up its gradients. With every sum over rows a ``sum``, and every number
that all processes hold ``shared`` where it goes into the rows of one, θ before all, first and second derivatives are
whole on each process.
"""

import os
import pickle
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

T = TypeVar("T")
DistNetworkError: type[Exception] = getattr(dist, "DistNetworkError", ConnectionError)  # a process cannot be reached


class Ranks(ABC):
    """Base class of the processes that share the rows.

    Attributes:
        rank: Place of this process among them, from 0.
        size: Their number.
        own: Names of the random terms whose levels have all their records on one process. There V has a process's own
            levels of such a term and no others; the levels of all other terms are the same everywhere. With each name
            the places of the own levels among those of all processes, or None for the order of the processes.
        sent: Bytes that this process has given to collectives.
    """

    rank: int = 0
    size: int = 1
    own: Mapping[str, np.ndarray | None] = MappingProxyType({})
    sent: int = 0

    @abstractmethod
    def owning(self, own: Iterable[str] | Mapping[str, np.ndarray | None]) -> "Ranks":
        """The same processes, with these terms as ``own``."""

    @abstractmethod
    def sums(self, *parts: Tensor) -> list[Tensor]:
        """The sum over the processes of each of some tensors, in one message; their gradients stay as they are."""

    @abstractmethod
    def shared(self, x: Tensor) -> Tensor:
        """A tensor that all processes hold, as it is; its gradients are added up over the processes."""

    @abstractmethod
    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over the processes, not differentiable."""

    @abstractmethod
    def first(self, x: Tensor) -> Tensor:
        """The tensor of the first process, not differentiable; shape and dtype are the same everywhere."""

    @abstractmethod
    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all processes, which may differ in their first dimension; not differentiable."""

    @abstractmethod
    def objects(self, x: T) -> list[T]:
        """An object of each process."""

    @abstractmethod
    def to_first(self, x: T) -> list[T]:
        """An object of each process on the first one, an empty list on the others."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes; its gradient stays as it is."""
        return self.sums(x)[0]

    def sum_if_own(self, name: str, x: Tensor) -> Tensor:
        """What each process has of its levels of a random term, added up where these are its own."""
        return self.sum(x) if name in self.own else x

    def sum_unless_own(self, name: str, x: Tensor) -> Tensor:
        """What each process has of its rows for the levels of a random term, added up where all have these levels."""
        return x if name in self.own else self.sum(x)

    def count(self, number: int) -> int:
        """The sum of an integer over the processes."""
        return sum(self.objects(number))

    def same_loss(self, loss: Tensor) -> Tensor:
        """A loss that all processes hold with the value of the first, in case that another one rounds otherwise."""
        return loss if self.size == 1 else loss + (self.first(loss) - loss.detach())

    def same_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give each process the gradients of the first one."""
        moved = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not moved:
            return
        flat = self.first(torch.cat([grad.reshape(-1) for grad in moved]))
        for grad, own in zip(moved, flat.split([grad.numel() for grad in moved]), strict=True):
            grad.copy_(own.reshape(grad.shape))

    def together(self, work: Callable[[], T]) -> T:
        """The result of work without messages; where it fails on any process, all raise the error of the first of them.

        Args:
            work: Called once, on each process.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            if self.size == 1:
                raise
            error = raised
        self.agree(error)
        return result  # type: ignore[return-value]

    def agree(self, error: Exception | None) -> None:
        """Raise on all processes where one has an error: that of the first of them, with its place.

        Args:
            error: What went wrong on this process; None where nothing did.
        """
        verdicts = self.objects(None if error is None else _Told.of(error))
        failed = [(place, verdict) for place, verdict in enumerate(verdicts) if verdict is not None]
        if not failed:
            return
        place, told = failed[0]
        raise told.error("" if len(set(verdicts)) == 1 else f" (On process {place + 1} of {self.size}.)") from error


class _Told(NamedTuple):
    """An error as names and text: its class may be one that no other process has."""

    kinds: tuple[tuple[str, str], ...]  # module and name of its class and of what that is derived from
    text: str
    of_system: tuple[int, str, str | None] | None  # number, text and file of an OSError

    @classmethod
    def of(cls, error: Exception) -> "_Told":
        derived = [kind for kind in type(error).__mro__ if issubclass(kind, Exception)]
        kinds = tuple((kind.__module__, kind.__qualname__) for kind in derived)
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)  # which adds quotes
        if not isinstance(error, OSError) or error.errno is None:
            return cls(kinds, text, None)
        file = error.filename
        return cls(kinds, text, (error.errno, error.strerror or "", None if file is None else os.fsdecode(file)))

    def error(self, where: str) -> Exception:
        """The error with its place: of the first of its classes that is known here and is made from a text."""
        for module, name in self.kinds:
            kind = getattr(sys.modules.get(module), name, None)
            if kind is None or kind is Exception:
                continue
            with suppress(Exception):
                if self.of_system is not None:
                    number, text, file = self.of_system
                    return kind(number, text + where, *([] if file is None else [file]))
                return kind(self.text + where)
        return RuntimeError(f"{self.kinds[0][1].rpartition('.')[2]}: {self.text}{where}")


class Alone(Ranks):
    """One process that has all rows."""

    def owning(self, own: Iterable[str] | Mapping[str, np.ndarray | None]) -> "Ranks":
        return self

    def sums(self, *parts: Tensor) -> list[Tensor]:
        return list(parts)

    def shared(self, x: Tensor) -> Tensor:
        return x

    def largest(self, x: Tensor) -> Tensor:
        return x

    def first(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        return [x]

    def objects(self, x: T) -> list[T]:
        return [x]

    def to_first(self, x: T) -> list[T]:
        return [x]


ALONE = Alone()


class ProcessGroup(Ranks):
    """The processes of a group of ``torch.distributed``.

    Args:
        own: Names of the random terms whose levels are whole on one process each, or a dictionary from them to the
            places of the own levels among those of all processes.
        group: The group; the default one when left out.
    """

    def __init__(self, own: Iterable[str] | Mapping[str, np.ndarray | None] = (), group: Any = None) -> None:
        self.own = own if isinstance(own, Mapping) else dict.fromkeys(own)
        self.group = group
        self.rank, self.size, self.sent = dist.get_rank(group), dist.get_world_size(group), 0
        self._first = 0 if group is None else dist.get_global_rank(group, 0)

    def owning(self, own: Iterable[str] | Mapping[str, np.ndarray | None]) -> "Ranks":
        return ProcessGroup(own, self.group)

    def sums(self, *parts: Tensor) -> list[Tensor]:
        total = _Sum.apply(self, torch.cat([part.reshape(-1) for part in parts]))
        pieces = total.split([part.numel() for part in parts])
        return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]

    def shared(self, x: Tensor) -> Tensor:
        return _Shared.apply(self, x)

    def largest(self, x: Tensor) -> Tensor:
        return self._reduced(x, largest=True)

    def first(self, x: Tensor) -> Tensor:
        message = self._message(x)
        self.sent += message.nbytes if self.rank == 0 else 0
        dist.broadcast(message, self._first, group=self.group)
        return message.to(x.device)

    def gather(self, x: Tensor) -> list[Tensor]:
        lengths = [int(length) for length in self._equal(torch.tensor([len(x)]))]
        padded = x.detach().new_zeros((max(lengths), *x.shape[1:]))
        padded[: len(x)] = x.detach()
        return [part[:length] for part, length in zip(self._equal(padded), lengths, strict=True)]

    def objects(self, x: T) -> list[T]:
        return [pickle.loads(part.numpy().tobytes()) for part in self.gather(_pickled(x))]

    def to_first(self, x: T) -> list[T]:
        data = _pickled(x)
        padded = data.new_zeros(int(self.largest(torch.tensor(len(data)))))
        padded[: len(data)] = data  # what is pickled says where it ends
        message = self._message(padded)
        parts = [torch.empty_like(message) for _ in range(self.size)] if self.rank == 0 else None
        self.sent += message.nbytes
        dist.gather(message, parts, self._first, group=self.group)
        return [pickle.loads(part.cpu().numpy().tobytes()) for part in parts or []]

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _message(self, x: Tensor) -> Tensor:
        """A copy of a tensor to send: NCCL takes tensors on a GPU only."""
        device = torch.device("cuda") if dist.get_backend(self.group) == "nccl" else x.device
        return x.detach().to(device, copy=True, memory_format=torch.contiguous_format)

    def _reduced(self, x: Tensor, largest: bool = False) -> Tensor:
        message = self._message(x)
        self.sent += message.nbytes
        dist.all_reduce(message, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self.group)
        return message.to(x.device)

    def _equal(self, x: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape."""
        message = self._message(x)
        parts = [torch.empty_like(message) for _ in range(self.size)]
        self.sent += message.nbytes
        dist.all_gather(parts, message, group=self.group)
        return [part.to(x.device) for part in parts]


def processes(own: Iterable[str] | Mapping[str, np.ndarray | None] = ()) -> Ranks:
    """The processes of the default group of ``torch.distributed``; `ALONE` where there is none, or one process in it.

    Args:
        own: As `ProcessGroup` has it.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return ProcessGroup(own) if several else ALONE


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, ranks: ProcessGroup, x: Tensor) -> Tensor:
        ctx.ranks = ranks
        return ranks._reduced(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, _Shared.apply(ctx.ranks, grads[0])


class _Shared(Function):
    @staticmethod
    def forward(ctx: Any, ranks: ProcessGroup, x: Tensor) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, _Sum.apply(ctx.ranks, grads[0])


def _pickled(x: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(x)), dtype=torch.uint8)
