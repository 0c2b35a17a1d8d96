"""What is looked at before a training; in trainings in test_regressor.py."""

import warnings
from types import SimpleNamespace

import pytest

from openreml_nn.lightning.network_checks import check_before_training
from openreml_nn.nn import Effects, MixedModelHead


def check(mode="batch", **options):
    plain = {"lr_scheduler_configs": [], "enable_validation": True, "precision": "32-true", "num_training_batches": 3}
    check_before_training(SimpleNamespace(**plain | options), MixedModelHead({"a": Effects(2)}, mode))


def test_options_that_do_not_go_together():
    plateau = [SimpleNamespace(reduce_on_plateau=True, monitor="val/mse")]
    with pytest.raises(ValueError, match="watches `val/mse`, and this fit has no validation"):
        check(lr_scheduler_configs=plateau, enable_validation=False)
    with pytest.warns(UserWarning, match="'bf16-true'.* rounds y"):
        check(precision="bf16-true")
    with pytest.warns(UserWarning, match="wants all rows as one batch, and the loader gives 3 batches"):
        check("exact")


def test_options_that_do():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check()
        check("exact", num_training_batches=1)
        check("exact", num_training_batches=float("inf"))
        check(precision="bf16-mixed", lr_scheduler_configs=[SimpleNamespace(reduce_on_plateau=True, monitor="val/mse")])
        check(lr_scheduler_configs=[SimpleNamespace(reduce_on_plateau=True, monitor="own")], enable_validation=False)
