"""The likelihood per row of independent clusters, against the dense normal distribution of all rows."""

import math

import pytest
import torch

from openreml_nn.metrics.functional import negative_loglik_per_row


def test_clusters_add_up_to_all_rows() -> None:
    sizes = [1, 4, 2, 5]
    blocks = [torch.eye(n, dtype=torch.float64) + 0.7 for n in sizes]
    y = [torch.randn(n, dtype=torch.float64) for n in sizes]
    losses = [
        0.5 * (n * math.log(2 * math.pi) + torch.logdet(V) + r @ torch.linalg.solve(V, r))
        for n, V, r in zip(sizes, blocks, y, strict=True)
    ]
    V = torch.block_diag(*blocks)
    whole = torch.distributions.MultivariateNormal(torch.zeros(12, dtype=torch.float64), V).log_prob(torch.cat(y))
    got = negative_loglik_per_row(torch.stack(losses), torch.tensor(sizes))
    torch.testing.assert_close(got, -whole / 12)
    torch.testing.assert_close(negative_loglik_per_row(torch.stack(losses), 12), got)


def test_bad_input() -> None:
    loss = torch.ones(2)
    with pytest.raises(TypeError, match=r"whole numbers as `rows`, got 2.0"):
        negative_loglik_per_row(loss, 2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="whole numbers as `rows`"):
        negative_loglik_per_row(loss, loss)
    with pytest.raises(TypeError, match="a tensor of real numbers as `loss`, got float"):
        negative_loglik_per_row(3.0, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a number of rows for each loss, got shapes \(3,\) and \(2,\)"):
        negative_loglik_per_row(loss, torch.tensor([1, 2, 3]))
    for values, rows in ((loss / 0.0, 3), (loss, -1), (loss, torch.tensor([3, -1]))):
        with pytest.raises(ValueError, match="needs finite losses and numbers of rows of at least 0"):
            negative_loglik_per_row(values, rows)
