"""A network with a `MixedModelHead` as a LightningModule: a shell around both, without mathematics."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MetricCollection

from openreml_nn.lightning.network_batches import form_of, joined, leaves, parts_of, rows_once, same_levels
from openreml_nn.lightning.network_checkpoints import TRAINED, what_differs, write_last_step_again
from openreml_nn.lightning.network_checks import check_before_training
from openreml_nn.lightning.network_scores import VAL_MSE, scores
from openreml_nn.nn import MixedModelHead, Rows, in_chunks
from openreml_nn.result import FitResult


class MixedModelRegressor(L.LightningModule):
    r"""Trains y = f(x) + Zb + ε: any network for f (or for features), a head for the rest.

    Batches are ``(x, y, groups)``, groups as `MixedModelHead` takes them; for prediction ``(x, groups)`` also does.
    Batch training wants whole clusters: ``DataLoader(data, batch_sampler=ClusterBatchSampler(codes, size))``, and a
    `Trainer` of several processes ``use_distributed_sampler=False``. The exact likelihood wants a loader that gives all
    rows as one batch, ``DataLoader([(x, y, groups)], batch_size=None)``, and moves its tensors to the device once: they
    must not be changed in place.

    Random effects are predicted from all training rows before each validation and at the end of a fit. For that each
    process reads the data set of the training loader once in its order: all of its rows, whatever their order in
    training; those of a ``SubsetRandomSampler``, those with a weight of a ``WeightedRandomSampler``, and those of one
    pass of a sampler of your own. A data set without length (an `IterableDataset`) is read through the loader. A data
    set must therefore not be an augmented one.

    Checkpoints hold the random effects of the last prediction. Those that are written after a validation, or by
    ``trainer.save_checkpoint`` after the fit, predict by themselves. A `ModelCheckpoint` without validation writes
    before the end of the fit: its files of the last step are then written again, with the random effects, and with the
    variance parameters of the refit. Files of earlier steps stay as they are: without random effects, where there was
    no validation (load one, then give it the training loader with ``condition``), and always without the refit. Beside
    the refit a file holds the variance parameters of before it, and a training that goes on has these: the callback
    `RandomState` and more ``max_epochs`` give the training that was never stopped, bit by bit. ``load_from_checkpoint``
    wants network and head, and to train on also the makers of optimizer and scheduler.

    Logged are ``train/loss`` (−ℓ per row), each variance parameter as ``variance/<name>`` on its natural scale at the
    end of an epoch, and ``val/mse`` or ``test/mse`` of f + z'b̂. With ``metrics=True`` also ``nlpd``, the negative log
    density of y in its predicted distribution, ``coverage`` of 95 % intervals, ``r2_marginal``, ``r2_conditional`` and
    ``icc``, of the same rows. `MixedModelHead.scored` gives what metrics of your own take.

    Args:
        network: Gives f, or features, from x.
        head: The mixed model of its output.
        optimizer: Makes an optimizer of parameters; Adam by default.
        scheduler: Makes a scheduler of the learning rate, for a step after each epoch; ``ReduceLROnPlateau`` watches
            ``val/mse``, and steps after the epochs that have a validation.
        start: Where the thetas start: ``"data"``: from the variance of y over the training rows, a share for each term;
            ``"current"``: where they are; ``"auto"``: from the data if all are at their raw default 0. An offset of
            the head that is 0 becomes the mean of y, unless ``"current"``.
        head_lr: Learning rate of the thetas; that of the network when left out. Thetas are logarithms of standard
            deviations or of their like, and have no weight decay, which would draw variances to 1. The weights of a
            kernel's network (`NeuralMatrix`) are trained as those of the network.
        refit: Fit the variance parameters by REML at the end, the network being fixed.
        variances: Keep what variances of predictions need (see ``MixedModelHead.condition``).
        rows: Rows at once where the network is evaluated on all rows.
        metrics: Log more than the squared error of validation and test rows; this needs ``variances``.

    Attributes:
        result: The refit, once there is one.

    Raises:
        TypeError: ``optimizer`` is a finished one, or a batch holds other things than tensors.
        ValueError: ``start`` is none of the three, there are metrics without variances, ``ReduceLROnPlateau`` has no
            validation to watch, a batch is of another form, or predictions are asked of a checkpoint without random
            effects.

    Warns:
        UserWarning: The best checkpoint is of an earlier step than the refit; the exact likelihood gets minibatches;
            the Trainer rounds y to half precision.

    Example:
        >>> import torch
        >>> from openreml_nn.lightning import MixedModelRegressor
        >>> from openreml_nn.nn import Effects, MixedModelHead
        >>> module = MixedModelRegressor(torch.nn.Linear(3, 1), MixedModelHead({"site": Effects(50)}), refit=True)
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
        scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        metrics: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("start", "head_lr", "refit", "variances", "rows", "metrics", logger=False)
        if metrics and not variances:
            raise ValueError("`metrics` need variances of predictions, got metrics=True and variances=False.")
        if start not in ("auto", "data", "current"):
            raise ValueError(f"`start` must be 'auto', 'data' or 'current', got {start!r}.")
        if not callable(optimizer):
            raise TypeError(
                f"`optimizer` makes an optimizer of parameters, as `torch.optim.Adam` or `lambda p: "
                f"torch.optim.Adam(p, lr=0.01)`; got a finished one, {type(optimizer).__name__}."
            )
        self.network, self.head, self.start = network, head, start
        self.make_optimizer, self.make_scheduler, self.head_lr = optimizer, scheduler, head_lr
        self.refit, self.variances, self.rows, self.metrics = refit, variances, rows, metrics
        self.result: FitResult | None = None
        self.val_scores, self.test_scores = scores("val/", metrics), scores("test/", metrics)
        self._all: tuple[Any, Rows] | None = None
        self._moved: tuple[list[Any], torch.device, Any] | None = None
        self._trained: list[Tensor] | None = None

    def forward(self, x: Any) -> Tensor:
        """What the network gives, without the offset of the head."""
        return self.network(x)

    # ---- training ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.head_lr is not None or optimizer.defaults.get("weight_decay"):
            thetas = self.head.thetas
            others = [p for p in self.parameters() if all(p is not theta for theta in thetas)]
            own = {"weight_decay": 0.0} | ({} if self.head_lr is None else {"lr": self.head_lr})
            optimizer = self.make_optimizer([{"params": others}, {"params": thetas} | own])
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        steps: dict[str, Any] = {"scheduler": scheduler, "monitor": VAL_MSE}
        if isinstance(scheduler, ReduceLROnPlateau) and self._trainer is not None:
            steps["frequency"] = self.trainer.check_val_every_n_epoch or 1
        return {"optimizer": optimizer, "lr_scheduler": steps}

    def on_train_start(self) -> None:
        check_before_training(self.trainer, self.head)
        if self.trainer.global_step > 0:
            self._go_on()
        elif self.start != "current":
            self._start_from_data()
        self._trained = None

    def _go_on(self) -> None:
        """A training that goes on has the thetas of before the refit."""
        if self._trained is not None:
            with torch.no_grad():
                for theta, trained in zip(self.head.thetas, self._trained, strict=True):
                    theta.copy_(trained)

    def _start_from_data(self) -> None:
        thetas = self.start == "data" or not any(bool(p.any()) for p in self.head.thetas)
        offset = self.head.mode != "features" and not self.head.offset
        if thetas or offset:
            _, y, groups = self._whole(self.trainer.train_dataloader, evaluate=False)  # type: ignore[arg-type]
            if thetas:
                self.head.start(y, groups)
            elif offset:
                self.head.offset.copy_(y.to(torch.float64).mean())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Drop random effects of a validation: the thetas move, and DDP would send them before each step."""
        self.head.posterior = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, groups = parts_of(batch)
        if self.head.mode == "exact":
            loss = self.head(self._in_chunks(x), y, self._all_rows(groups))
        else:
            loss = self.head(self.network(x), y, groups)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(y))
        return loss

    def _all_rows(self, groups: Any) -> Rows:
        """What the exact likelihood needs of the levels, made anew only where a batch has others."""
        if self._all is None or not same_levels(self._all[0], groups):
            self._all = (groups, self.head.rows(groups))
        return self._all[1]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on the device; that of the exact likelihood, the same at each step, is moved there once."""
        if self.head.mode != "exact" or not self.training:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        given, (kept, where, _) = list(leaves(batch)), self._moved or ([], None, None)
        if where != device or len(kept) != len(given) or any(a is not b for a, b in zip(kept, given, strict=True)):
            self._moved = (given, device, super().transfer_batch_to_device(batch, device, dataloader_idx))
        assert self._moved is not None
        return self._moved[2]

    # as `functools.wraps` does it: Lightning warns of a hook of its own beside a data module, and not of a wrapped one
    transfer_batch_to_device.__wrapped__ = L.LightningModule.transfer_batch_to_device  # type: ignore[attr-defined]

    def on_train_epoch_end(self) -> None:
        values = {f"variance/{name}": value for name, value in self.head.variance().items()}
        self.log_dict(values, sync_dist=True)  # they are the same on all processes

    def on_train_end(self) -> None:
        self._all = self._moved = None
        self.condition(self.trainer.train_dataloader, self.refit)  # type: ignore[arg-type]
        write_last_step_again(self.trainer, self.refit)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside a refit a checkpoint holds the thetas of the training, from which it goes on."""
        if self._trained is not None:
            checkpoint[TRAINED] = self._trained

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the state of a checkpoint; a ValueError says in which sizes that of another model differs."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            said = what_differs(state_dict, self.state_dict()) or str(error)
            raise ValueError(f"The checkpoint is of another model: {said}. Give the model of its training.") from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._trained = checkpoint.get(TRAINED)

    # ---- random effects ----------------------------------------------------------------------------------------------

    def condition(self, loader: Iterable, refit: bool = False) -> None:
        """Predict the random effects from all training rows, or ``refit`` the variance parameters too.

        Args:
            loader: The training loader, or any batches ``(x, y, groups)`` that have each row once.
            refit: Fit the variance parameters by REML.
        """
        output, y, groups = self._whole(loader)
        if refit:
            self._trained = self._trained or [theta.detach().clone() for theta in self.head.thetas]
            self.result = self.head.refit(output, y, groups, self.variances)
        else:
            self.head.condition(output, y, groups, self.variances)

    def _whole(self, loader: Iterable, evaluate: bool = True) -> tuple[Tensor, Tensor, Any]:
        """Output of the network in evaluation mode (the response again without), response and levels of all rows."""
        pieces, training = [], self.training
        precision = None if self._trainer is None else self._trainer.precision_plugin
        self.eval()
        drawn = torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])  # loaders draw a number each
        with drawn, torch.inference_mode(False), torch.no_grad():
            for batch in rows_once(loader, self.rows):
                x, y, groups = parts_of(self.transfer_batch_to_device(batch, self.device, 0))
                with nullcontext() if precision is None else precision.forward_context():
                    x = x if precision is None else precision.convert_input(x)
                    pieces.append((self._in_chunks(x) if evaluate else y, y, groups))
        self.train(training)
        if not pieces:
            raise ValueError("`MixedModelRegressor` needs training rows to predict the random effects; there are none.")
        return joined(pieces)

    def _in_chunks(self, x: Any) -> Tensor:
        return in_chunks(self.network, x, self.rows) if isinstance(x, Tensor) else self.network(x)

    # ---- validation and prediction -----------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.condition(self.trainer.train_dataloader)  # type: ignore[arg-type]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.sanity_checking:
            self.network(parts_of(batch)[0])  # there are no random effects yet
        else:
            self._score(batch, self.val_scores)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._score(batch, self.test_scores)

    def _score(self, batch: Any, collection: MetricCollection) -> None:
        """Log the scores of the rows of a batch."""
        x, y, groups = parts_of(batch)
        self._require_effects()
        if self.metrics:
            collection.update(**self.head.scored(self.network(x), y, groups))
        else:
            mean, _ = self.head.predict(self.network(x), groups, variances=False)
            collection.update(mean, y.reshape(-1).to(mean))
        self.log_dict(collection, batch_size=len(y), prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        """Mean and variance of new observations; see ``MixedModelHead.predict``."""
        self._require_effects()
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise ValueError(f"Batches are (x, y, groups), for prediction also (x, groups), got {form_of(batch)}.")
        x, groups = batch[0], batch[-1]
        return self.head.predict(self.network(x), groups, variances=self.variances)

    def _require_effects(self) -> None:
        """Raise a ValueError where there are no random effects to predict with."""
        if self.head.posterior is None:
            raise ValueError(
                "This model has no random effects to predict with: it was not fitted, or its checkpoint was written "
                "before a validation and before the end of the fit. On the command line make one with them by "
                "`openreml-nn network refit --ckpt_path FILE`. In Python load the checkpoint "
                "(`load_from_checkpoint`), call `model.condition(train_loader)`, and predict without `ckpt_path`, "
                "which would load it again. Or take a checkpoint that was written after a validation or the fit."
            )
