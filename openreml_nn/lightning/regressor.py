"""A network with a `MixedModelHead` as a LightningModule: a shell around both, without mathematics."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanSquaredError

from openreml_nn.nn import MixedModelHead, Rows, in_chunks
from openreml_nn.result import FitResult


class MixedModelRegressor(L.LightningModule):
    r"""Trains y = f(x) + Zb + ε: any network for f (or for features), a head for the rest.

    Batches are ``(x, y, groups)``, groups as `MixedModelHead` takes them; for prediction ``(x, groups)`` also does.
    Batch training wants whole clusters: ``DataLoader(data, batch_sampler=ClusterBatchSampler(codes, size))``, and a
    `Trainer` of several processes ``use_distributed_sampler=False``. The exact likelihood wants a loader that gives all
    rows as one batch, ``DataLoader([(x, y, groups)], batch_size=None)``.

    Random effects are predicted from all training rows before each validation and at the end of a fit. For that the
    data set of the training loader is read from its first to its last row by each process, whatever sampler the loader
    has; a data set without length (an `IterableDataset`) is read through the loader. A data set must therefore not be
    an augmented one. Checkpoints that are written after a validation, or after the fit, predict by themselves; to one
    of another moment give the training loader with ``condition``.

    Logged are ``train/loss`` (−ℓ per row), each variance parameter as ``variance/<name>`` on its natural scale at the
    end of an epoch, and ``val/mse`` of f + z'b̂.

    Args:
        network: Gives f, or features, from x.
        head: The mixed model of its output.
        optimizer: Makes an optimizer of parameters; Adam by default.
        start: Where the thetas start: ``"data"``: from the variance of y over the training rows, a share for each term;
            ``"current"``: where they are; ``"auto"``: from the data if all are at their raw default 0.
        head_lr: Learning rate of the thetas, which then are a group of their own without weight decay; that of the
            network when left out. Thetas are logarithms of standard deviations or of their like.
        refit: Fit the variance parameters by REML at the end, the network being fixed.
        variances: Keep what variances of predictions need (see ``MixedModelHead.condition``).
        rows: Rows at once where the network is evaluated on all rows.

    Attributes:
        result: The refit, once there is one.
    """

    def __init__(
        self,
        network: nn.Module,
        head: MixedModelHead,
        optimizer: Callable[[Iterable], Optimizer] = torch.optim.Adam,
        start: Literal["auto", "data", "current"] = "auto",
        head_lr: float | None = None,
        refit: bool = False,
        variances: bool = True,
        rows: int = 4096,
    ) -> None:
        super().__init__()
        if start not in ("auto", "data", "current"):
            raise ValueError(f"`start` must be 'auto', 'data' or 'current', got {start!r}.")
        self.network, self.head, self.start = network, head, start
        self.make_optimizer, self.head_lr = optimizer, head_lr
        self.refit, self.variances, self.rows = refit, variances, rows
        self.result: FitResult | None = None
        self.val_mse = MeanSquaredError().set_dtype(torch.float64)
        self._all: tuple[Any, Rows] | None = None

    def forward(self, x: Any) -> Tensor:
        """What the network gives."""
        return self.network(x)

    # ---- training ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        if self.head_lr is None:
            return self.make_optimizer(self.parameters())
        own = {"params": list(self.head.parameters()), "lr": self.head_lr, "weight_decay": 0.0}
        return self.make_optimizer([{"params": list(self.network.parameters())}, own])

    def on_train_start(self) -> None:
        untouched = not any(bool(p.any()) for p in self.head.parameters())
        if self.trainer.global_step == 0 and (self.start == "data" or (self.start == "auto" and untouched)):
            _, y, groups = self._whole(self.trainer.train_dataloader, evaluate=False)  # type: ignore[arg-type]
            self.head.start(y, groups)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, groups = batch
        if self.head.mode == "exact":
            loss = self.head(self._in_chunks(x), y, self._all_rows(groups))
        else:
            loss = self.head(self.network(x), y, groups)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(y))
        return loss

    def _all_rows(self, groups: Any) -> Rows:
        """What the exact likelihood needs of the levels, made anew only where a batch has others."""
        if self._all is None or not _same(self._all[0], groups):
            self._all = (groups, self.head.rows(groups))
        return self._all[1]

    def on_train_epoch_end(self) -> None:
        self.log_dict({f"variance/{name}": value for name, value in self.head.variance().items()})

    def on_train_end(self) -> None:
        self._all = None
        self.condition(self.trainer.train_dataloader, self.refit)  # type: ignore[arg-type]

    # ---- random effects ----------------------------------------------------------------------------------------------

    def condition(self, loader: Iterable, refit: bool = False) -> None:
        """Predict the random effects from all training rows, or ``refit`` the variance parameters too.

        Args:
            loader: The training loader, or any batches ``(x, y, groups)`` that have each row once.
            refit: Fit the variance parameters by REML.
        """
        output, y, groups = self._whole(loader)
        if refit:
            self.result = self.head.refit(output, y, groups, self.variances)
        else:
            self.head.condition(output, y, groups, self.variances)

    def _whole(self, loader: Iterable, evaluate: bool = True) -> tuple[Tensor, Tensor, Any]:
        """Output of the network in evaluation mode (the response again without), response and levels of all rows."""
        parts, training = [], self.training
        precision = None if self._trainer is None else self._trainer.precision_plugin
        self.eval()
        with torch.inference_mode(False), torch.no_grad():
            for batch in whole(loader, self.rows):
                x, y, groups = self.transfer_batch_to_device(batch, self.device, 0)
                with nullcontext() if precision is None else precision.forward_context():
                    x = x if precision is None else precision.convert_input(x)
                    parts.append((self._in_chunks(x) if evaluate else y, y, groups))
        self.train(training)
        if not parts:
            raise ValueError("`MixedModelRegressor` needs training rows to predict the random effects; there are none.")
        return joined(parts)

    def _in_chunks(self, x: Any) -> Tensor:
        return in_chunks(self.network, x, self.rows) if isinstance(x, Tensor) else self.network(x)

    # ---- validation and prediction -----------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.condition(self.trainer.train_dataloader)  # type: ignore[arg-type]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, groups = batch
        if self.trainer.sanity_checking:
            self.network(x)  # there are no random effects yet
            return
        mean, _ = self.head.predict(self.network(x), groups, variances=False)
        self.val_mse(mean, y.reshape(-1).to(mean))
        self.log("val/mse", self.val_mse, batch_size=len(mean), prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        """Mean and variance of new observations; see ``MixedModelHead.predict``."""
        x, groups = batch[0], batch[-1]
        return self.head.predict(self.network(x), groups, variances=self.variances)


def whole(loader: Iterable, rows: int) -> Iterable:
    """Batches with each row of a loader's data set once, in the order of the data set.

    Args:
        loader: A DataLoader; anything else, and one over an `IterableDataset`, is given back as it is.
        rows: Rows of a batch.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    size = None if loader.batch_size is None and loader.batch_sampler is None else rows
    return DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)


def joined(parts: list[Any]) -> Any:
    """Tensors, or dictionaries and tuples of them, one after the other."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts]) for name in first}
    return tuple(joined(list(own)) for own in zip(*parts, strict=True))


def _same(a: Any, b: Any) -> bool:
    """Whether two batches have the same levels."""
    one, two = list(_tensors(a)), list(_tensors(b))
    return len(one) == len(two) and all(x is y or torch.equal(x, y) for x, y in zip(one, two, strict=True))


def _tensors(groups: Any) -> Iterator[Tensor]:
    if isinstance(groups, Tensor):
        yield groups
    else:
        for part in groups.values() if isinstance(groups, Mapping) else groups:
            yield from _tensors(part)
