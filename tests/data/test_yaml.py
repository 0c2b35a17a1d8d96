"""Terms in YAML: the same objects as in Python, made by jsonargparse."""

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

from openreml_nn.covariance import AR1Matrix, FactorAnalyticMatrix, KnownMatrix, UnstructuredMatrix
from openreml_nn.data import MixedModel, Term, TermLike


class Holder:
    """What a data module declares."""

    def __init__(
        self,
        table: str,
        fixed: str,
        random: dict[str, TermLike] | list[str | list[str]] | str | None = None,
        residual: dict[str, Term] | Term | None = None,
    ) -> None:
        self.model = MixedModel(table, fixed, random, residual)


def model(text: str) -> MixedModel:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "data")
    return parser.instantiate(parser.parse_string(text)).data.model


def test_short_forms() -> None:
    V = model("""
        data:
          table: john_alpha
          fixed: yield ~ rep
          random: {gen: gen, block: "rep:block", other: [col, block]}
    """).V
    assert V.natural_names == ["gen/sigma^2", "block/sigma^2", "other/sigma^2", "residual/sigma^2"]
    assert model("data: {table: john_alpha, fixed: yield ~ rep, random: [gen, 'rep:block']}").V.num_params == 3
    assert model("data: {table: john_alpha, fixed: yield ~ rep, random: gen}").V.num_params == 2
    both = model("data: {table: john_alpha, fixed: yield ~ rep, random: [gen, [rep, block]]}").V
    assert both.operand_names == ["gen", "rep:block", "residual"]


def test_terms_structures_and_kernels() -> None:
    V = model("""
        data:
          table: twotrait
          fixed: y ~ trait
          random:
            herd: {groups: herd, design: 1 + sex}
            animal:
              groups: animal
              within: trait
              covariance: openreml_nn.covariance.UnstructuredMatrix
              relationship:
                class_path: openreml_nn.data.Kernel
                init_args: {source: twotrait_A}
          residual: {groups: animal, within: trait, covariance: UnstructuredMatrix}
    """).V
    assert V.operand_names == ["herd", "animal", "residual"]
    effects, kernel = V.operand("animal").G.operand_list()
    assert isinstance(effects, UnstructuredMatrix)
    assert isinstance(kernel, KnownMatrix)
    assert V.operand("herd").G.operand_list()[0].natural_names == ["sigma^2_Intercept", "sigma_Intercept_sex[T.M]",
                                                                   "sigma^2_sex[T.M]"]


def test_options_of_a_structure() -> None:
    V = model("""
        data:
          table: fa1
          fixed: y ~ env
          random:
            gen:
              groups: gen
              within: env
              covariance:
                class_path: openreml_nn.covariance.FactorAnalyticMatrix
                init_args: {k: 2}
          residual: {design: 0 + env}
    """).V
    factor = V.operand("gen").G.operand_list()[0]
    assert isinstance(factor, FactorAnalyticMatrix)
    assert factor.k == 2
    assert V.operand("residual").is_diagonal


def test_separable_residual_with_a_nugget() -> None:
    V = model("""
        data:
          table: ar1ar1
          fixed: y ~ 1
          residual:
            spatial:
              within:
                row: openreml_nn.covariance.AR1Matrix
                col: {class_path: openreml_nn.covariance.AR1Matrix, init_args: {start: [1, 0.5]}}
            nugget: {}
    """).V
    row, col = V.operand("spatial").G.operand_list()
    assert isinstance(row, AR1Matrix)
    torch.testing.assert_close(col.natural(col.theta).detach(), torch.tensor([1.0, 0.5], dtype=torch.float64))
    alone = model("""
        data:
          table: orthodont
          fixed: distance ~ age
          residual: {groups: Subject, within: occ, covariance: AR1Matrix}
    """)
    assert alone.V.natural_names == ["residual/sigma^2", "residual/rho"]


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(ArgumentError, match="covarance"):
        model("data: {table: oats, fixed: yield ~ 1, random: {Block: {groups: Block, covarance: AR1Matrix}}}")


def test_a_term_has_no_class_path() -> None:
    with pytest.raises(ValueError, match="takes its fields directly"):
        model("data: {table: oats, fixed: yield ~ 1, residual: {class_path: openreml_nn.data.Term, init_args: {}}}")
