"""y, X and V of a table against a naive dense construction."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    FactorAnalyticMatrix,
    GaussianMatrix,
    KnownMatrix,
    Matrix,
    ScalarMatrix,
    UnstructuredMatrix,
)
from openreml_nn.data import Kernel, MixedModel, Term, read_table, table_path


def same(column: pd.Series) -> np.ndarray:
    """1 where two rows have the same value."""
    return (column.to_numpy()[:, None] == column.to_numpy()).astype(float)


def lags(column: pd.Series) -> np.ndarray:
    return np.abs(column.to_numpy()[:, None] - column.to_numpy())


def check(V: Matrix, expected: np.ndarray) -> None:
    torch.testing.assert_close(V().detach(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_alpha_lattice() -> None:
    t = read_table("john_alpha")
    model = MixedModel("john_alpha", "yield ~ rep", ["gen", "rep:block"])
    model.V.set_theta(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    expected = np.exp(0.2) * same(t.gen) + np.exp(0.4) * same(t.rep) * same(t.block) + np.exp(0.6) * np.eye(72)
    check(model.V, expected)
    assert model.x_names == ["Intercept", "rep[T.R2]", "rep[T.R3]"]
    assert (model.y.dtype, model.X.dtype, model.X.shape) == (torch.float64, torch.float64, (72, 3))
    assert model.V.natural_names == ["gen/sigma^2", "rep:block/sigma^2", "residual/sigma^2"]
    assert isinstance(model.V.operand("residual"), ScalarMatrix)
    Z = model.V.operand("rep:block").Z
    assert (len(Z.levels), Z.levels[0]) == (18, "R1:B1")
    assert (model.dropped, len(model.rows), model.response) == (0, 72, "yield")
    assert "n=72" in repr(model)


def test_a_list_of_columns_in_a_list_is_one_term() -> None:
    model = MixedModel("pastes", "strength ~ 1", random=[["batch", "cask"], "batch"])
    assert model.V.operand_names == ["batch:cask", "batch", "residual"]
    assert len(model.V.operand("batch:cask").Z.levels) == 30


@pytest.mark.parametrize(("fixed", "columns"), [("strength ~ 0", 0), ("strength ~ 0 + x", 1), ("strength ~ x", 2)])
def test_any_number_of_fixed_effects(fixed: str, columns: int) -> None:
    t = read_table("pastes").assign(x=np.arange(60.0))
    model = MixedModel(t, fixed, "batch")
    assert model.X.shape == (60, columns)
    assert model.design(t).X.shape == (60, columns)


def test_random_slopes() -> None:
    t = read_table("sleepstudy")
    start = [[600.0, 10.0], [10.0, 35.0]]
    random = {"Subject": Term("Subject", "1 + Days", partial(UnstructuredMatrix, start=start))}
    model = MixedModel("sleepstudy", "Reaction ~ Days", random)
    X = np.column_stack([np.ones(180), t.Days])
    check(model.V, X @ np.array(start) @ X.T * same(t.Subject) + np.eye(180))
    assert model.V.natural_names[:3] == [
        "Subject/sigma^2_Intercept",
        "Subject/sigma_Intercept_Days",
        "Subject/sigma^2_Days",
    ]
    assert MixedModel("sleepstudy", "Reaction ~ Days", {"S": Term("Subject", "1 + Days")}).V.num_params == 4


@pytest.mark.parametrize("spec", [{"design": "0 + Variety"}, {"within": "Variety"}])
def test_a_variance_for_each_variety_in_each_block(spec: dict[str, str]) -> None:
    t = read_table("oats")
    S = np.array([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]])
    term = Term("Block", covariance=partial(UnstructuredMatrix, start=S), **spec)
    model = MixedModel("oats", "yield ~ nitro", {"Block": term})
    at = t.Variety.map({"GoldenRain": 0, "Marvellous": 1, "Victory": 2}).to_numpy()
    check(model.V, S[at][:, at] * same(t.Block) + np.eye(72))


def test_separable_rows_and_columns_with_a_nugget() -> None:
    t = read_table("ar1ar1").sample(frac=0.9, random_state=1)
    spatial = Term(within={"row": partial(AR1Matrix, start=[2.0, 0.5]), "col": partial(AR1Matrix, start=[7.0, -0.3])})
    model = MixedModel(t, "y ~ 1", "gen", {"spatial": spatial, "nugget": Term()})
    check(model.V, same(t.gen) + 2.0 * 0.5 ** lags(t.row) * (-0.3) ** lags(t.col) + np.eye(len(t)))
    assert model.V.natural_names == [
        "gen/sigma^2",
        "spatial/row/sigma^2",
        "spatial/row/rho",
        "spatial/col/sigma^2",
        "spatial/col/rho",
        "nugget/sigma^2",
    ]
    assert [model.V.natural_names[i] for i in model.V.no_grad_index] == ["spatial/col/sigma^2"]


def test_separable_within_groups() -> None:
    t = pd.concat([read_table("ar1ar1").assign(site=site) for site in "ab"], ignore_index=True)
    term = Term("site", within={"row": partial(AR1Matrix, start=[2.0, 0.5]), "col": partial(AR1Matrix, start=[1, 0.2])})
    model = MixedModel(t, "y ~ 1", residual=term)
    check(model.V, 2.0 * 0.5 ** lags(t.row) * 0.2 ** lags(t.col) * same(t.site))


def test_a_residual_variance_for_each_sex() -> None:
    t = read_table("orthodont")
    model = MixedModel(t, "distance ~ age", residual=Term(design="0 + Sex"))
    model.V.set_theta(torch.tensor([0.3, -0.2], dtype=torch.float64))
    check(model.V, np.diag(np.where(t.Sex == "Female", np.exp(0.6), np.exp(-0.4))))
    assert model.V.is_diagonal
    assert model.V.natural_names == ["residual/sigma^2_Sex[Female]", "residual/sigma^2_Sex[Male]"]
    start = Term(design="0 + Sex", covariance=partial(DiagonalMatrix, start=[2.0, 3.0]))
    V = MixedModel(t, "distance ~ age", residual=start).V
    check(V, np.diag(np.where(t.Sex == "Female", 2.0, 3.0)))


def test_serial_correlation_with_gaps_and_missing_times() -> None:
    t = read_table("ovary")
    t = t[~t.idx.isin([4, 5])].sample(frac=0.7, random_state=2)
    term = Term("Mare", within="idx", covariance=partial(AR1Matrix, start=[3.0, 0.6]))
    model = MixedModel(t, "follicles ~ sin2pt + cos2pt", residual=term)
    check(model.V, 3.0 * 0.6 ** lags(t.idx) * same(t.Mare))
    assert model.V.natural_names == ["residual/sigma^2", "residual/rho"]
    V = model.V.add_to(torch.zeros(model.V.shape, dtype=torch.float64), model.V.theta)
    torch.testing.assert_close(V, model.V())


def test_coordinates() -> None:
    t = read_table("wheat2")
    term = Term(within=["latitude", "longitude"], covariance=partial(GaussianMatrix, start=[2.0, 5.0]))
    model = MixedModel(t, "yield ~ 1", residual={"spatial": term, "nugget": Term()})
    square = lags(t.latitude) ** 2 + lags(t.longitude) ** 2
    check(model.V, 2.0 * np.exp(-square / 25.0) + np.eye(len(t)))


def test_residual_over_the_rows_knows_dropped_rows() -> None:
    t = read_table("orthodont_miss").head(12)
    model = MixedModel(t, "distance ~ 1", residual=Term(covariance=partial(AR1Matrix, start=[1, 0.5])), missing="drop")
    place = pd.Series(np.flatnonzero(t.distance.notna()))
    assert model.dropped > 0
    check(model.V, 0.5 ** lags(place))


def test_kernel_keeps_its_order_and_all_its_labels() -> None:
    t = read_table("gblup150").iloc[::2]
    K = pd.read_csv(table_path("gblup150_K"), index_col=0)
    order = np.random.default_rng(3).permutation(150)
    K = K.iloc[order, order]
    model = MixedModel(t, "y ~ trial", {"line": Term("line", relationship=Kernel(K))})
    check(model.V, K.loc[t.line, t.line].to_numpy() + np.eye(75))
    line = model.V.operand("line")
    assert line.Z.levels == list(K.index)
    assert isinstance(line.G, KnownMatrix)
    assert model.V.natural_names == ["line/sigma^2", "residual/sigma^2"]


def test_two_traits_of_related_animals() -> None:
    t = read_table("twotrait").sample(frac=0.8, random_state=4)
    A = pd.read_csv(table_path("twotrait_A"), index_col=0).loc[t.animal, t.animal].to_numpy()
    Sg, Se = np.array([[3.0, 1.0], [1.0, 2.0]]), np.array([[4.0, -1.0], [-1.0, 5.0]])
    genetic = Term(
        "animal", within="trait", covariance=partial(UnstructuredMatrix, start=Sg), relationship=Kernel("twotrait_A")
    )
    residual = Term("animal", within="trait", covariance=partial(UnstructuredMatrix, start=Se))
    model = MixedModel(t, "y ~ trait + trait:sex + trait:herd", {"animal": genetic}, residual)
    at = (t.trait == "t2").to_numpy().astype(int)
    check(model.V, Sg[at][:, at] * A + Se[at][:, at] * same(t.animal))
    names, fixed = model.V.natural_names, model.V.no_grad_index
    assert names[:4] == ["animal/sigma^2_t1", "animal/sigma_t1_t2", "animal/sigma^2_t2", "animal/sigma^2"]
    assert fixed == [3]
    assert model.x_names == [
        "Intercept",
        "trait[T.t2]",
        "trait[t1]:sex[T.M]",
        "trait[t2]:sex[T.M]",
        "trait[t1]:herd[T.H2]",
        "trait[t2]:herd[T.H2]",
        "trait[t1]:herd[T.H3]",
        "trait[t2]:herd[T.H3]",
    ]


def test_one_scale_in_every_product() -> None:
    t = read_table("fa1").assign(year=lambda d: d.env.str[1:].astype(int))
    first = {"gen": Term("gen", within="env", covariance=partial(FactorAnalyticMatrix, k=1))}
    assert MixedModel(t, "y ~ env", first).V.no_grad_index == []
    second = {"year": Term("year", "0 + rep", UnstructuredMatrix, AR1Matrix)}
    V = MixedModel(t, "y ~ 1", second).V
    assert [V.natural_names[i] for i in V.no_grad_index] == ["year/year/sigma^2"]
    third = {"year": Term(within={"rep": UnstructuredMatrix, "env": UnstructuredMatrix})}
    V = MixedModel(t, "y ~ 1", third).V
    assert [V.param_names[i] for i in V.no_grad_index] == ["year/op_1/env/L_E1_E1"]
    alone = MixedModel(t, "y ~ 1", {"year": Term("year", relationship=AR1Matrix)}).V.operand("year")
    assert isinstance(alone, CovariancePropagation)
    assert isinstance(alone.G, AR1Matrix)


def test_formulas_code_as_r_does() -> None:
    t = read_table("twotrait")
    assert MixedModel(t, "y ~ 0 + trait:sex").x_names == [
        "trait[t1]:sex[F]",
        "trait[t2]:sex[F]",
        "trait[t1]:sex[M]",
        "trait[t2]:sex[M]",
    ]
    assert MixedModel(t, "y ~ sex * herd").x_names == [
        "Intercept",
        "sex[T.M]",
        "herd[T.H2]",
        "herd[T.H3]",
        "sex[T.M]:herd[T.H2]",
        "sex[T.M]:herd[T.H3]",
    ]
    ordered = t.assign(herd=pd.Categorical(t.herd, ["H3", "H9", "H1", "H2"], ordered=True))
    assert MixedModel(ordered, "y ~ herd").x_names == ["Intercept", "herd[T.H1]", "herd[T.H2]"]


def test_columns_with_any_name() -> None:
    names = {"nitro": "N per plot", "Block": "big/block", "Variety": "a:b", "yield": "t/ha"}
    t = read_table("oats").rename(columns=names)
    random = {"block": "big/block", "plot": ["big/block", "a:b"], "v": "a:b"}
    model = MixedModel(t, "log(`t/ha`) ~ `N per plot`", random)
    assert model.x_names == ["Intercept", "N per plot"]
    assert len(model.V.operand("plot").Z.levels) == 18
    torch.testing.assert_close(model.y, torch.tensor(np.log(t["t/ha"].to_numpy())))


def test_rank_deficient_x_is_kept() -> None:
    t = read_table("cake").query("not (recipe == 'C' and temperature == 'T225')")
    X = MixedModel(t, "angle ~ recipe * temperature", "replicate").X
    assert (X.shape[1], int(torch.linalg.matrix_rank(X))) == (18, 17)


def test_a_response_of_another_type_is_converted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    assert MixedModel("oats", "yield ~ 1").y.dtype == torch.float64
    assert [r.getMessage() for r in caplog.records] == ["The response 'yield' is int64 and was converted to float64."]


def test_missing_rows_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    model = MixedModel("orthodont_miss", "distance ~ age + Sex", {"S": Term("Subject", "1 + age")}, missing="drop")
    assert (model.dropped, len(model.y), len(model.rows), model.V.shape) == (12, 96, 96, (96, 96))
    assert "Dropped 12 of 108 rows" in caplog.text


def test_new_rows_without_a_level_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = MixedModel("sleepstudy", "Reaction ~ Days", "Subject")
    new = read_table("sleepstudy").head(3).assign(Subject=["S308", None, "S999"])
    assert model.design(new).known["Subject"].tolist() == [True, False, False]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "1 of 3 new rows have no value in 'Subject', and are taken as rows of a level that is not in"
    )
