"""The methods that are compared: one network and one training for all; they differ in what they make of the levels."""

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

from lmmnn.backfitting import Backfitting, total
from lmmnn.data import Rows, join
from openreml_nn.nn import ClusterBatchSampler, Effects, MixedModelHead, in_chunks

HIDDEN = (100, 50, 25, 12)
BASELINES = ("ignore", "one-hot", "embedding")
OURS = ("batch", "exact", "features", "alternating")
CHUNK = 4000  # rows that the network takes at once where a step has all of them


class Recipe(NamedTuple):
    """How every method is trained: Adam, and at the end the weights of the epoch with the best validation error.

    Attributes:
        batch: Rows of a batch.
        epochs: Epochs at most.
        rate: Learning rate; the highest one where it goes up and down.
        one_cycle: Whether the rate follows one cycle over all epochs (Smith & Topin 2019).
        dropout: Share of units left out behind each of the first three layers.
        patience: Epochs without a better validation error after which the training ends.
        steps: Steps of the exact mode, in the place of epochs: 10 iterations of L-BFGS each, so no rate.
    """

    batch: int
    epochs: int
    rate: float
    one_cycle: bool
    dropout: float
    patience: int | None = None
    steps: int = 40


PLAIN = Recipe(batch=500, epochs=20, rate=0.02, one_cycle=True, dropout=0.0)
PAPERS = Recipe(batch=30, epochs=500, rate=0.001, one_cycle=False, dropout=0.25, patience=10)
RECIPES = {"plain": PLAIN, "papers": PAPERS}


class Network(nn.Module):
    """The papers' network, 100-50-25-12 with ReLU: f(x), or the 12 features before the last layer.

    ``one-hot`` columns are a table of their weights in the first layer; an ``embedding`` of a tenth of the levels (of
    at most 100 numbers) is put beside x.
    """

    def __init__(self, inputs: int, levels: tuple[int, ...], method: str, dropout: float) -> None:
        super().__init__()
        self.method = method
        widths = [min(100, max(1, q // 10)) for q in levels] if method == "embedding" else []
        if method == "one-hot":
            widths = [HIDDEN[0] for _ in levels]
        self.tables = nn.ModuleList(nn.Embedding(q, k) for q, k in zip(levels, widths, strict=False))
        sizes = [inputs + (sum(widths) if method == "embedding" else 0), *HIDDEN]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.last = nn.Identity() if method == "features" else nn.Linear(HIDDEN[-1], 1)
        self.dropout = nn.Dropout(dropout)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Embedding):
                nn.init.uniform_(layer.weight, -0.05, 0.05)

    def forward(self, x: Tensor, codes: list[Tensor]) -> Tensor:
        parts = [table(code) for table, code in zip(self.tables, codes, strict=False)]
        if self.method == "embedding":
            x, parts = torch.cat([x, *parts], dim=1), []
        for i, layer in enumerate(self.layers):
            x = torch.relu(layer(x) + (sum(parts) if i == 0 and parts else 0.0))
            x = self.dropout(x) if i < 3 else x
        return self.last(x)


class Regression(L.LightningModule):
    """A network trained by its squared error or, with a head, by the marginal likelihood.

    Args:
        network: Called with x and the codes.
        recipe: How it is trained.
        steps: Steps of the whole training.
        train: Rows that it is trained with.
        head: Random effects, for our methods.
        backfitting: For ``alternating``: twice in an epoch it predicts the effects and the variances anew from all rows
            of ``train``. A batch of whole clusters of the first factor then has its likelihood given the effects of all
            others: at the predictions b̂₂ = G₂Z₂'V⁻¹(y − f) its gradient in f is V₁⁻¹(y − f − Z₂b̂₂) = V⁻¹(y − f), that
            of all rows. So this is maximum likelihood where no batch can hold all rows that depend on one another.
    """

    def __init__(
        self, network: Network, recipe: Recipe, steps: int, train: Rows, head: MixedModelHead | None = None,
        backfitting: Backfitting | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.recipe, self.steps, self.head, self.known = network, recipe, steps, head, train
        self.exact = head.rows(train.groups) if head is not None and head.mode == "exact" else None
        self.backfitting = backfitting
        if head is not None and backfitting is not None:
            self.first = MixedModelHead(dict([next(iter(head.effects.items()))]))
            self.first.residual = head.requires_grad_(False).residual

    # ---- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Rows, _: int) -> Tensor:
        if self.exact is not None:
            output = in_chunks(lambda x: self.network(x, []), batch.x, CHUNK)
            return self.head(output, batch.y, self.exact)
        output = self.network(batch.x, batch.codes)
        if self.head is None:
            return (output[:, 0] - batch.y).square().mean()
        if self.backfitting is not None:
            y = batch.y - total(self.backfitting.effects[1:], batch.codes[1:])
            return self.first(output, y, batch.codes[0])
        return self.head(output, batch.y, batch.groups)

    def configure_optimizers(self) -> Any:
        if self.exact is not None:
            return torch.optim.LBFGS(self.parameters(), max_iter=10, history_size=10, line_search_fn="strong_wolfe")
        optimizer = torch.optim.Adam(self.parameters(), lr=self.recipe.rate, fused=True)
        if not self.recipe.one_cycle:
            return optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.recipe.rate, self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, _outputs: Any, _batch: Rows, index: int) -> None:
        if self.backfitting is None or (index + 1) % max(1, int(self.trainer.num_training_batches) // 2):
            return
        assert self.head is not None
        self.backfitting.update(self.known.y - self.outputs(self.known)[:, 0])
        matrices = [*(own.G for own in self.head.effects.values()), self.head.residual]
        for matrix, value in zip(matrices, [*self.backfitting.sigma2, self.backfitting.residual], strict=True):
            matrix.set_theta(matrix.from_natural(torch.tensor([value], dtype=torch.float64)))

    # ---- predictions -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def outputs(self, rows: Rows) -> Tensor:
        """What the network gives for all rows."""
        was = self.network.training
        self.network.eval()
        output = self.network(rows.x, rows.codes)
        self.network.train(was)
        return output

    def condition(self) -> None:
        """Predict the effects from all known rows."""
        assert self.head is not None
        self.head.condition(self.outputs(self.known), self.known.y, self.known.groups, variances=False)

    def predictions(self, rows: Rows) -> Tensor:
        """f(x), or f(x) + z'b̂ with the effects that were predicted last."""
        output = self.outputs(rows)
        if self.backfitting is not None:
            return output[:, 0] + total(self.backfitting.effects, rows.codes)
        return output[:, 0] if self.head is None else self.head.predict(output, rows.groups, variances=False)[0]

    def on_validation_epoch_start(self) -> None:
        if self.head is not None and self.backfitting is None:
            self.condition()

    def validation_step(self, batch: Rows, _: int) -> None:
        error = (self.predictions(batch) - batch.y).square().mean()
        self.log("validation_error", error, batch_size=len(batch.y), on_epoch=True)


# ---- one fit ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a fit gives.

    Attributes:
        mse: Mean squared error of the predictions of the test rows.
        error_f: Mean squared difference of the network's output from f there, each centred; NaN for baselines.
        variances: Variance parameters of the refit.
        trained: The same before the refit.
        epochs: Epochs that were run.
        seconds: Process time of training and refit.
    """

    mse: float = float("nan")
    error_f: float = float("nan")
    variances: dict[str, float] = field(default_factory=dict)
    trained: dict[str, float] = field(default_factory=dict)
    epochs: int = 0
    seconds: float = 0.0


def run(
    method: str, recipe: Recipe, effects: Callable[[], dict[str, Effects]], rows: tuple[Rows, Rows, Rows], seed: int,
    blocks: int = 1, refit: bool = True, last_layer: bool = False,
) -> dict[str, Outcome]:  # fmt: skip
    """Train by one method, refit the variances by REML to all rows but the test rows, predict these.

    Args:
        method: One of `BASELINES` and `OURS`.
        recipe: How it is trained.
        effects: Makes the random effects.
        rows: For training, validation and test.
        seed: Seed of the network and of the order of the batches.
        blocks: Neighbouring levels of the first factor that a batch keeps together.
        refit: Whether to fit the variances, or else to keep those of the training.
        last_layer: Whether also to fit the last layer anew by REML, together with the variances, the network before it
            being fixed and without dropout; for methods whose network gives f.

    Returns:
        The outcome by the name of the method; that with a new last layer is the method ``last layer``.
    """
    train, validation, _ = rows
    torch.manual_seed(seed)
    began = time.process_time()
    head = None
    if method in OURS:
        head = MixedModelHead(effects(), mode=method if method in ("exact", "features") else "batch")
    levels = tuple(own.num_levels for own in effects().values())
    batches = _batches(method, recipe, train, seed, blocks)
    epochs = recipe.steps if method == "exact" else recipe.epochs
    backfitting = Backfitting(train.codes, levels) if method == "alternating" else None
    network = Network(train.x.shape[1], levels, method, recipe.dropout)
    module = Regression(network, recipe, epochs * len(batches), train, head, backfitting)
    epochs = fit(module, batches, validation, epochs)
    module.backfitting = None  # from here on the head predicts
    trained = {} if head is None else head.variance()
    outcomes = {method: _finish(module, rows, refit)}
    if last_layer:
        network.last = nn.Identity()
        module.head = MixedModelHead(effects(), mode="features")
        outcomes["last layer"] = _finish(module, rows, refit=True)
    for outcome in outcomes.values():
        outcome.trained, outcome.epochs, outcome.seconds = trained, epochs, time.process_time() - began
    return outcomes


def _finish(module: Regression, rows: tuple[Rows, Rows, Rows], refit: bool) -> Outcome:
    """Variances, effects and predictions of a trained network."""
    known, test, head = join(rows[0], rows[1]), rows[2], module.head
    outcome = Outcome()
    if head is not None:
        finish: Callable[..., Any] = head.refit if refit else head.condition
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "X is rank deficient")  # features that are 0 everywhere
            finish(module.outputs(known), known.y, known.groups, variances=False)
        outcome.variances = head.variance() if refit else {}
        f = head.predict(module.outputs(test), _nobody(test), variances=False)[0] - test.f
        outcome.error_f = f.var().item()
    outcome.mse = (module.predictions(test) - test.y).square().mean().item()
    return outcome


def fit(module: Regression, batches: Sampler[list[int]], validation: Rows, epochs: int) -> int:
    """Run the Trainer, bring back the best weights, and say how many epochs there were."""
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="validation_error", save_weights_only=True)
        callbacks: list[Callback] = [best]
        if module.recipe.patience is not None:
            callbacks.append(EarlyStopping("validation_error", patience=module.recipe.patience, check_finite=False))
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=epochs, callbacks=callbacks, logger=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            trainer.fit(
                module,
                DataLoader(module.known, batch_sampler=batches, collate_fn=_as_it_is),  # type: ignore[arg-type]
                DataLoader([validation], batch_size=None, collate_fn=_as_it_is),  # type: ignore[arg-type]
            )
        module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    return trainer.current_epoch


def _batches(method: str, recipe: Recipe, train: Rows, seed: int, blocks: int) -> Sampler[list[int]]:
    if method == "exact":
        return BatchSampler(range(len(train.y)), len(train.y), drop_last=False)
    if method in OURS:
        with warnings.catch_warnings():  # parts of a cluster of 500 rows tell 499/500 of what they know of f
            warnings.filterwarnings("ignore", ".*are split; batches leave out.*")
            return ClusterBatchSampler(train.codes[0] // blocks, recipe.batch, seed=seed)
    order = RandomSampler(train.y, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return BatchSampler(order, recipe.batch, drop_last=False)


def _as_it_is(batch: Rows) -> Rows:
    return batch


def _nobody(rows: Rows) -> Any:
    """The levels of nobody: −1 everywhere."""
    return {name: (torch.full_like(given[0], -1), given[1]) if isinstance(given, tuple) else torch.full_like(given, -1)
            for name, given in rows.groups.items()}  # fmt: skip
