"""`FitRecord`: what a checkpoint says of a fit, and which fit may go on from it."""

import pytest

from openreml_nn.lightning import REMLModule
from openreml_nn.lightning.records import FitRecord


def test_comes_back_from_a_checkpoint(data, trainer):
    module, checkpoint = REMLModule(data().covariance), {}
    trainer().fit(module, data())
    module.on_save_checkpoint(checkpoint)
    record = FitRecord.of(checkpoint)
    assert record.history == module.history
    assert (record.parameters, record.optimizer) == (module.covariance.natural_names, "AverageInformation")
    assert record.data["number of rows"] == "72"
    again: dict = {}
    record.write(again)
    assert again == checkpoint
    assert FitRecord.of({}) == FitRecord()


def test_another_fit_does_not_go_on():
    record = FitRecord(["residual/sigma^2"], optimizer="LBFGS")
    record.require_parameters(["residual/sigma^2"])
    with pytest.raises(ValueError, match="of another model: it has the parameters"):
        record.require_parameters(["gen/sigma^2"])
    with pytest.raises(ValueError, match="of a fit by LBFGS, this one is by AverageInformation"):
        record.require_optimizer("AverageInformation")
    FitRecord().require_parameters(["x"])
    FitRecord().require_optimizer("Adam")
