"""V read as Σ_g ⊗ K + Σ_e ⊗ I: rows in order of individual and trait are that, for each way to write it."""

import re

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from openreml_nn.covariance import (
    AR1Matrix,
    CellMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DiagonalPropagation,
    DummyMatrix,
    IdentityMatrix,
    KhatriRaoMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.solvers.trait_form import TraitForm, trait_form
from openreml_nn.testing.kernels import random_kernel

LEVELS, TRAITS = 6, 2
SEEN = [0, 2, 3, 5]  # individuals with records
N = len(SEEN) * TRAITS
ORDER = torch.randperm(N, generator=torch.Generator().manual_seed(2))
LEVEL = torch.tensor(SEEN).repeat_interleave(TRAITS)[ORDER]
TRAIT = torch.arange(TRAITS).repeat(len(SEEN))[ORDER]
Z = DummyMatrix(LEVEL, levels=range(LEVELS))
CELLS = CellMatrix(TRAIT, Z, ["r", "s"])
INDICATORS = one_hot(TRAIT, TRAITS).to(torch.float64)
K = random_kernel(LEVELS)


def US() -> UnstructuredMatrix:
    return UnstructuredMatrix(TRAITS)


def genetic(design: Matrix, G: Matrix) -> CovariancePropagation:
    return CovariancePropagation(design, G)


ERROR = CovariancePropagation(CELLS, KroneckerProduct(US(), IdentityMatrix(LEVELS)))
PLAIN = genetic(CELLS, KroneckerProduct(US(), KnownMatrix(K)))
FORMS: dict[str, Sum] = {
    "cells": Sum(g=PLAIN, residual=ERROR),
    "residual first": Sum(residual=ERROR, g=PLAIN),
    "indicators": Sum(
        g=genetic(KhatriRaoMatrix(INDICATORS, Z), KroneckerProduct(US(), KnownMatrix(K))), residual=ERROR
    ),
    "one residual variance": Sum(g=PLAIN, residual=ScalarMatrix(N)),
    "a fixed residual": Sum(g=PLAIN, residual=IdentityMatrix(N)),
    "a residual variance for each trait": Sum(
        g=PLAIN, residual=DiagonalPropagation(INDICATORS, DiagonalMatrix(TRAITS))
    ),
    "a kernel without a scale": Sum(
        g=genetic(CELLS, KroneckerProduct(AR1Matrix(TRAITS), SimpleMatrix(K))), residual=ERROR
    ),
    "three factors": Sum(
        g=genetic(CELLS, KroneckerProduct(ScalarMatrix(1), AR1Matrix(TRAITS), KnownMatrix(K))), residual=ERROR
    ),
    "independent individuals": Sum(
        g=genetic(CELLS, KroneckerProduct(US(), IdentityMatrix(LEVELS))), residual=ScalarMatrix(N)
    ),
    "one trait": Sum(
        g=genetic(DummyMatrix(SEEN, levels=range(LEVELS)), KroneckerProduct(ScalarMatrix(1), KnownMatrix(K))),
        residual=ScalarMatrix(len(SEEN)),
    ),
    "one individual": Sum(
        g=KroneckerProduct(US(), KnownMatrix(K[:1, :1])), residual=KroneckerProduct(US(), IdentityMatrix(1))
    ),
    "individuals slower": Sum(g=KroneckerProduct(KnownMatrix(K), US()), residual=ScalarMatrix(LEVELS * TRAITS)),
    "traits slower": Sum(g=KroneckerProduct(US(), KnownMatrix(K)), residual=ScalarMatrix(LEVELS * TRAITS)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_rows_in_order(name: str) -> None:
    V = FORMS[name]
    form = trait_form(V)
    assert isinstance(form, TraitForm)
    theta = 0.4 * torch.randn(V.num_params, dtype=torch.float64)
    given, counts = form.source.tensors
    assert counts is not None
    seen = form.source.observed
    kernel = torch.eye(len(counts), dtype=torch.float64) if given is None else given
    kernel = kernel[seen][:, seen]
    sigma_g, sigma_e = form.sigma_g.of(V, theta), form.sigma_e.of(V, theta)
    assert sigma_g.shape == sigma_e.shape == (form.traits, form.traits)
    expected = torch.kron(kernel, sigma_g) + torch.kron(torch.eye(len(seen), dtype=torch.float64), sigma_e)
    torch.testing.assert_close(V.build(theta)[form.order][:, form.order], expected)


@pytest.mark.parametrize("name", ["cells", "a residual variance for each trait", "three factors"])
def test_sigmas_are_differentiable(name: str) -> None:
    V = FORMS[name]
    form = trait_form(V)
    assert isinstance(form, TraitForm)

    def sigmas(theta: Tensor) -> tuple[Tensor, Tensor]:
        return form.sigma_g.of(V, theta), form.sigma_e.of(V, theta)

    assert torch.autograd.gradcheck(sigmas, torch.full((V.num_params,), 0.2, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    ("V", "reason"),
    [
        (ScalarMatrix(N), "two operands, .* V: a ScalarMatrix is no `KroneckerProduct`"),
        (Sum(g=PLAIN, h=PLAIN, residual=ERROR), "two operands"),
        (Sum(g=PLAIN, residual=PLAIN), "both have a known matrix"),
        (Sum(g=PLAIN, residual=AR1Matrix(N)), "residual: a AR1Matrix is none"),
        (Sum(g=genetic(CELLS, KroneckerProduct(US(), AR1Matrix(LEVELS))), residual=ScalarMatrix(N)), "known matrix"),
        (Sum(g=genetic(KhatriRaoMatrix(INDICATORS + 1.0, Z), KroneckerProduct(US(), KnownMatrix(K))),
             residual=ScalarMatrix(N)), "one effect of one level"),
        (Sum(g=PLAIN, residual=DiagonalPropagation(INDICATORS.flip(1), DiagonalMatrix(TRAITS))), "another order"),
        (Sum(g=genetic(CellMatrix(TRAIT, DummyMatrix(LEVEL.clamp(max=3), levels=range(LEVELS)), ["r", "s"]),
                       KroneckerProduct(US(), KnownMatrix(K))), residual=ScalarMatrix(N)),
         "each of 2 traits once, got 8 rows of 3 individuals"),
    ],
)  # fmt: skip
def test_what_it_is_not(V: Matrix, reason: str) -> None:
    found = trait_form(V)
    assert isinstance(found, str)
    assert re.search(reason, found)
