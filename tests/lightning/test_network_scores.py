"""The collection of scores; their values in test_regressor.py."""

import torch

from openreml_nn.lightning.network_scores import scores


def test_names_and_states():
    assert list(scores("val/", more=False)) == ["val/mse"]
    more = scores("test/", more=True)
    names = ("mse", "nlpd", "coverage", "r2_marginal", "r2_conditional", "icc")
    assert set(more) == {f"test/{name}" for name in names}
    y = torch.tensor([1e8, 1e8 + 1.0], dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    shares = {"fixed": y, "random_variance": one, "residual_variance": one}
    more.update(preds=y + 0.5, target=y, variance=one, known=one > 0, **shares)
    found = more.float().compute()
    assert found["test/mse"].item() == 0.25  # in float64, whatever a model is cast to
    assert found["test/icc"].item() == 0.5
