"""Predictions: means and variances against dense conditioning, for known and new levels, crossed terms and kernels."""

import psutil
import pytest
import torch

from openreml_nn import fit
from openreml_nn.covariance import DummyMatrix, KnownMatrix
from openreml_nn.nn import Effects, MixedModelHead, posterior
from openreml_nn.nn.posterior import quadratic_forms


def both(old, new):
    """Rows of two batches, one after the other."""
    if isinstance(old, tuple):
        return tuple(torch.cat(parts) for parts in zip(old, new, strict=True))
    return torch.cat([old, new])


def shared(head, groups, more):
    """The covariance of what random effects add to the rows of the data and to new ones."""
    V = head.covariance({name: both(own, more[name]) for name, own in groups.items()})().detach()
    return V - head.variance()["residual/sigma^2"] * torch.eye(len(V), dtype=torch.float64)


def test_equals_dense_conditioning(case):
    head = case.head()
    index = torch.randperm(len(case.y))[:20]
    more = case.rows(index)
    f = torch.randn(20, dtype=torch.float64)
    head.condition(case.f, case.y, case.groups)
    mean, variance = head.predict(f, more)
    C, n, s2 = shared(head, case.groups, more), len(case.y), head.variance()["residual/sigma^2"]
    V, k = C[:n, :n] + s2 * torch.eye(n, dtype=torch.float64), C[:n, n:]
    expected = f + k.mT @ torch.linalg.solve(V, case.y - case.f.detach())
    C_left = C[n:, n:] - k.mT @ torch.linalg.solve(V, k)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(variance, C_left.diagonal() + s2, rtol=0, atol=1e-10)
    torch.testing.assert_close(head.predict(f, more, of="mean")[1], C_left.diagonal(), rtol=0, atol=1e-10)
    assert mean.dtype == variance.dtype == torch.float64


def test_features_add_what_fixed_effects_do_not_know(case):
    head = case.head(mode="features")
    n = len(case.y)
    phi, index = torch.randn(n, 3, dtype=torch.float64), torch.randperm(n)[:20]
    more, psi = case.rows(index), torch.randn(20, 3, dtype=torch.float64)
    head.condition(phi, case.y, case.groups)
    mean, variance = head.predict(psi, more, of="mean")
    X, x = (torch.cat([torch.ones_like(part[:, :1]), part], dim=1) for part in (phi, psi))
    C, s2 = shared(head, case.groups, more), head.variance()["residual/sigma^2"]
    Vi, k = torch.linalg.inv(C[:n, :n] + s2 * torch.eye(n, dtype=torch.float64)), C[:n, n:]
    B = torch.linalg.inv(X.mT @ Vi @ X)
    beta = B @ X.mT @ Vi @ case.y
    left = x - k.mT @ Vi @ X
    expected = (C[n:, n:] - k.mT @ Vi @ k + left @ B @ left.mT).diagonal()
    torch.testing.assert_close(mean, x @ beta + k.mT @ Vi @ (case.y - X @ beta), rtol=0, atol=1e-9)
    torch.testing.assert_close(variance, expected, rtol=0, atol=1e-9)


def test_new_levels_add_their_variance_and_nothing_to_the_mean(case):
    head = case.head()
    head.condition(case.f, case.y, case.groups)
    index = torch.arange(6)
    new = {name: (torch.full((6,), -1), own[1]) if isinstance(own, tuple) else torch.full((6,), -1)
           for name, own in case.rows(index).items()}  # fmt: skip
    f = torch.randn(6)
    mean, variance = head.predict(f, new)
    assert mean.tolist() == pytest.approx(f.tolist())
    expected = torch.full((6,), head.variance()["residual/sigma^2"], dtype=torch.float64)
    for name, own in head.effects.items():
        q, s = own.num_levels, own.num_effects
        x = new[name][1] if isinstance(new[name], tuple) else torch.ones(6, s, dtype=torch.float64)
        average = own.G().detach().reshape(s, q, s, q).diagonal(dim1=1, dim2=3).mean(2)
        expected += ((x @ average) * x).sum(1)
    torch.testing.assert_close(variance, expected, rtol=0, atol=1e-12)


def test_a_known_and_a_new_level_in_one_row(make):
    case = make("crossed")
    head = case.head()
    head.condition(case.f, case.y, case.groups)
    level = {"a": torch.tensor([2]), "b": torch.tensor([-1])}
    C, s2 = head.covariance(case.groups)().detach(), head.variance()["residual/sigma^2"]
    k = head.variance()["a/sigma^2"] * (case.groups["a"] == 2).double()
    mean, variance = head.predict(torch.zeros(1), level)
    Vik = torch.linalg.solve(C, k)
    assert mean.item() == pytest.approx((Vik @ (case.y - case.f.detach())).item(), abs=1e-12)
    left = head.variance()["a/sigma^2"] - k @ Vik + head.variance()["b/sigma^2"] + s2
    assert variance.item() == pytest.approx(left.item(), abs=1e-12)


def test_a_level_of_a_kernel_without_records_is_predicted_by_its_relatives():
    K = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    head = MixedModelHead({"line": Effects(["x", "y", "z"], covariance=KnownMatrix(K))})
    codes = head.effects["line"].encode(["x"] * 5 + ["z"] * 5)
    y = torch.tensor([2.0] * 5 + [0.0] * 5)
    head.condition(torch.zeros(10), y, codes)
    mean, variance = head.predict(torch.zeros(4), head.effects["line"].encode(["x", "y", "z", "new"]), of="mean")
    assert mean.tolist() == pytest.approx([2 * 5 / 6, 0.9 * 2 * 5 / 6, 0.0, 0.0])
    assert variance.tolist() == pytest.approx([1 - 5 / 6, 1 - 0.81 * 5 / 6, 1 - 5 / 6, 1.0])


def test_agrees_with_the_predictions_of_a_fit(make):
    case = make("crossed")
    head = case.head(mode="features")
    phi = torch.randn(len(case.y), 2, dtype=torch.float64)
    result = head.refit(phi, case.y, case.groups)
    psi = torch.randn(3, 2, dtype=torch.float64)
    codes = {"a": torch.tensor([0, 5, 2]), "b": torch.tensor([3, 3, 0])}
    mean, variance = head.predict(psi, codes, of="mean")
    Z = {name: DummyMatrix(codes[name].tolist(), levels=head.effects[name].level_names) for name in codes}
    table = result.predict(torch.cat([torch.ones(3, 1), psi], dim=1), Z)
    assert mean.tolist() == pytest.approx(table["prediction"].tolist(), abs=1e-10)
    assert variance.sqrt().tolist() == pytest.approx(table["std_error"].tolist(), abs=1e-10)
    assert fit(result.V, case.y, torch.cat([torch.ones(len(phi), 1), phi], dim=1)).loglik == pytest.approx(
        result.loglik, abs=1e-8
    )


def test_rank_deficient_features_are_dropped(make):
    case = make("intercepts")
    head, phi = case.head(mode="features"), torch.randn(len(case.y), 2, dtype=torch.float64)
    dead = torch.cat([torch.zeros(len(phi), 1), phi], dim=1)  # such as a unit that never fires
    other = case.head(mode="features")
    head.condition(phi, case.y, case.groups)
    other.condition(dead, case.y, case.groups)
    for one, two in zip(head.predict(phi, case.groups, "mean"), other.predict(dead, case.groups, "mean"), strict=True):
        torch.testing.assert_close(one, two)


def test_without_variances(make):
    case = make("crossed")
    head = case.head()
    head.condition(case.f, case.y, case.groups)
    expected = head.predict(case.f, case.groups)[0]
    head.condition(case.f, case.y, case.groups, variances=False)
    mean, variance = head.predict(case.f, case.groups, variances=False)
    assert torch.equal(mean, expected)
    assert variance is None
    with pytest.raises(ValueError, match="conditioned without variances"):
        head.predict(case.f, case.groups)


def test_variances_that_do_not_fit_are_said(make, monkeypatch):
    case = make("crossed")
    head = case.head()
    monkeypatch.setattr(posterior, "MATRICES_AT_PEAK", psutil.virtual_memory().total)
    with pytest.raises(MemoryError, match=r"The covariance of 4 effects \(4 x 4\).*variances=False"):
        head.condition(case.f, case.y, case.groups)
    head.condition(case.f, case.y, case.groups, variances=False)


@pytest.mark.parametrize("entries", [3, 100])
def test_quadratic_forms_of_sparse_rows(entries):
    W = torch.randn(12, 12, dtype=torch.float64)
    Phi = W @ W.mT
    row, column = torch.randint(0, 5, (entries,)), torch.randint(0, 12, (entries,))
    value = torch.randn(entries, dtype=torch.float64)
    w = torch.zeros(5, 12, dtype=torch.float64).index_put_((row, column), value, accumulate=True)
    torch.testing.assert_close(quadratic_forms(Phi, row, column, value, 5), ((w @ Phi) * w).sum(1))
