"""What a `MixedModelRegressor` looks at before a training, when the Trainer and its loaders are known."""

import math

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from openreml_nn.lightning.network_scores import VAL_MSE
from openreml_nn.nn import MixedModelHead


def check_before_training(trainer: L.Trainer, head: MixedModelHead) -> None:
    """Refuse or warn of options that do not go together.

    Raises:
        ValueError: ``ReduceLROnPlateau`` has no validation to watch.

    Warns:
        UserWarning: The exact likelihood gets minibatches; the Trainer rounds y to half precision.
    """
    watched = any(config.reduce_on_plateau and config.monitor == VAL_MSE for config in trainer.lr_scheduler_configs)
    if watched and not trainer.enable_validation:
        raise ValueError(
            "`ReduceLROnPlateau` watches `val/mse`, and this fit has no validation. Give `Trainer.fit` a loader of "
            "validation rows, or take a scheduler that needs none."
        )
    if trainer.precision in ("16-true", "bf16-true"):
        rank_zero_warn(
            f"`Trainer(precision={trainer.precision!r})` rounds y and designs to half precision before the "
            f"likelihood sees them. Take '16-mixed' or 'bf16-mixed': the network is in half precision, y is not."
        )
    if head.mode == "exact" and 1 < (batches := trainer.num_training_batches) < math.inf:
        rank_zero_warn(
            f"The exact likelihood wants all rows as one batch, and the loader gives {batches} batches: each is "
            f"taken as if it were all rows, slowly. Give `DataLoader([(x, y, groups)], batch_size=None)`, or take "
            f"a head of mode 'batch'."
        )
