"""What is wrong with a table or a term is one error that names it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from openreml_nn.covariance import AR1Matrix, UnstructuredMatrix
from openreml_nn.data import Kernel, MixedModel, Term, read_table, table_path

TRIAL, GROWTH, FIELD = read_table("john_alpha"), read_table("orthodont"), read_table("ar1ar1")
YIELD = TRIAL["yield"]
FIXED = "yield ~ rep"


def trial(**columns: Any) -> pd.DataFrame:
    return TRIAL.assign(**columns)


CASES: list[tuple[str, pd.DataFrame, str, dict[str, Any], str]] = [
    ("missing", trial(**{"yield": YIELD.where(TRIAL.index > 2), "rep": TRIAL.rep.where(TRIAL.index != 7)}), FIXED, {},
     r"'yield' \(3 rows\), 'rep' \(1 row\).*missing='drop'"),
    ("missing group", trial(gen=TRIAL.gen.where(TRIAL.index > 0)), FIXED, {"random": "gen"}, r"'gen' \(1 row\)"),
    ("nothing left", trial(**{"yield": np.nan}), FIXED, {"missing": "drop"}, "No row is left"),
    ("missing option", TRIAL, FIXED, {"missing": "ignore"}, "must be 'error' or 'drop'"),
    ("infinite", trial(**{"yield": YIELD.where(TRIAL.index > 0, np.inf)}), FIXED, {}, r"Infinite values in 'yield'"),
    ("log", TRIAL, "yield ~ log(row - 5)", {}, r"not finite in 5 rows of 'log\(row - 5\)'"),
    ("constant", trial(**{"yield": 1.0}), FIXED, {}, "'yield' is constant"),
    ("text response", TRIAL, "gen ~ rep", {}, "'gen' is not numeric"),
    ("one row", TRIAL.head(1), "yield ~ 1", {}, "at least two"),
    ("empty", TRIAL.head(0), FIXED, {}, "no rows"),
    ("one level", trial(a="x"), FIXED, {"random": "a"}, "Term 'a' has one level"),
    ("one level, fixed", trial(one="a"), "yield ~ one + row", {}, r"factor 'one', which has one level \('a'\)"),
    ("one level alone", trial(one=True), "yield ~ one", {}, r"factor 'one', which has one level \('True'\)"),
    ("one level of an expression", trial(one=1), "yield ~ 0 + C(one)", {}, r"factor 'C\(one\)', which has one level"),
    ("one level of a design", trial(one="a"), FIXED, {"random": {"g": Term("gen", "1 + one")}}, "'g' uses .*'one'"),
    ("no groups", TRIAL, FIXED, {"random": {"a": Term()}}, "Term 'a' has one level"),
    ("one cell", trial(a=1), FIXED, {"random": {"a": Term(within="a", covariance=AR1Matrix)}}, "one level of `within`"),
    ("a level a row", TRIAL, FIXED, {"random": "plot"}, "Term 'plot' has 72 levels for 72 rows.*confounded"),
    ("effects a row", GROWTH, "distance ~ 1", {"random": {"S": Term("Subject", "0 + C(age)")}}, "27 levels × 4 effec"),
    ("no groups, effects", GROWTH, "distance ~ 1", {"random": {"x": Term(design="0 + Sex")}}, "cannot be estimated"),
    ("column", TRIAL, FIXED, {"random": {"g": "gne"}}, "no column 'gne', which term 'g' uses; did you mean 'gen'"),
    ("within column", TRIAL, FIXED, {"random": {"g": Term("gen", within="x", covariance=AR1Matrix)}}, "no column 'x'"),
    ("design column", TRIAL, FIXED, {"random": {"g": Term("gen", "1 + roww")}}, "no column 'roww'.*did you mean 'row'"),
    ("fixed column", TRIAL, "yield ~ log(replicate)", {}, "no column 'replicate', which the fixed formula uses"),
    ("response column", TRIAL, "yeild ~ 1", {}, "no column 'yeild', which the response uses"),
    ("column twice", pd.concat([TRIAL, TRIAL[["rep"]]], axis=1), FIXED, {}, "2 columns named 'rep'"),
    ("formula", TRIAL, "yield ~ rep +", {}, "is not a formula"),
    ("keyword", TRIAL, "log(`yield`) ~ rep", {}, "Rename a column"),
    ("no formula", TRIAL, "", {}, "is empty"),
    ("no response", TRIAL, "~ rep", {}, "no response"),
    ("two responses", TRIAL, "yield + row ~ rep", {}, "one response"),
    ("bar", TRIAL, "yield ~ rep | gen", {}, "Random effects go into `random`"),
    ("bar in brackets", TRIAL, "yield ~ (1 | gen)", {}, "Random effects go into `random`"),
    ("function", TRIAL, "yield ~ np.nothing(row)", {}, "could not be evaluated"),
    ("design with response", TRIAL, FIXED, {"random": {"g": Term("gen", "yield ~ 1")}}, "Term 'g' needs a design"),
    ("list twice", TRIAL, FIXED, {"random": [["rep", "block"], "rep:block"]}, "'rep:block' is given twice"),
    ("name twice", TRIAL, FIXED, {"random": ["gen", "gen"]}, "'gen' is given twice"),
    ("term twice", TRIAL, FIXED, {"random": {"a": "gen", "b": "gen"}}, "'a' and 'b' are the same"),
    ("name of residual", TRIAL, FIXED, {"random": {"residual": "gen"}}, "a random and to a residual term"),
    ("slash", TRIAL, FIXED, {"random": {"a/b": "gen"}}, "without '/'"),
    ("no residual", TRIAL, FIXED, {"residual": {}}, "empty dictionary"),
    ("text times", FIELD, "y ~ 1", {"residual": Term(within={"rowf": AR1Matrix, "col": AR1Matrix})},
     "'residual': `AR1Matrix` over the levels of 'rowf' failed.*numeric"),
    ("structure of groups", FIELD, "y ~ 1", {"random": {"gen": Term("gen", covariance=AR1Matrix)}},
     "Term 'gen': `AR1Matrix` over the effects.*`relationship`"),
    ("no matrix", FIELD, "y ~ 1", {"random": {"gen": Term("gen", relationship=lambda levels: 1)}}, "got int"),
    ("wrong size", FIELD, "y ~ 1", {"random": {"gen": Term("gen", relationship=lambda _: AR1Matrix(2))}}, "size 30"),
    ("repeated", GROWTH, "distance ~ 1", {"residual": Term("Sex", within="age", covariance=AR1Matrix)},
     "100 of 108 rows have the same Sex, age"),
    ("group residual", GROWTH, "distance ~ 1", {"residual": Term("Subject")}, "V is singular"),
    ("zero design", trial(a=0.0), FIXED, {"residual": Term(design="0 + a")}, "zero in 72 rows"),
]


@pytest.mark.parametrize(("table", "fixed", "options", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_says_what_is_wrong(table: pd.DataFrame, fixed: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        MixedModel(table, fixed, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Term(covariance=AR1Matrix(3)), TypeError, "functools.partial"),
        (lambda: Term(covariance="AR1Matrix"), TypeError, "got str"),
        (lambda: Term("line", relationship="K.csv"), TypeError, r"known matrix Kernel\('K.csv'\)"),
        (lambda: Term(within="age"), ValueError, "needs a `covariance`"),
        (lambda: Term(within="age", design="0 + b", covariance=AR1Matrix), ValueError, "not both"),
        (lambda: Term(within={"a": AR1Matrix}, covariance=AR1Matrix), ValueError, "not both"),
        (lambda: Term(""), ValueError, "empty `groups`"),
        (lambda: Term(relationship=AR1Matrix), ValueError, "needs the `groups`"),
        (lambda: MixedModel(TRIAL, FIXED, {"x": 5}), TypeError, "Term 'x' must be"),
        (lambda: MixedModel(TRIAL, FIXED, [Term("gen")]), TypeError, "in a list of random terms has no name"),
        (lambda: MixedModel(TRIAL, FIXED, [["rep", 1]]), TypeError, "must be a `Term` or the names of columns"),
        (lambda: Kernel(np.eye(3)), TypeError, "needs the labels of its rows: a DataFrame .*, or a file, got ndarray"),
        (lambda: MixedModel(TRIAL, FIXED, residual={"x": "gen"}), TypeError, "'x' must be a `Term`"),
    ],
)
def test_says_what_does_not_go_together(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_confounded_only_with_an_unstructured_residual() -> None:
    MixedModel("gblup150", "y ~ 1", {"line": Term("line", relationship=Kernel("gblup150_K"))})
    serial = Term(within="row", covariance=AR1Matrix)
    MixedModel(TRIAL, FIXED, "plot", serial)
    MixedModel(GROWTH, "distance ~ 1", residual=Term("Subject", within="age", covariance=UnstructuredMatrix))


K = pd.read_csv(table_path("gblup150_K"), index_col=0)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (K.iloc[:, :-1], "A must be square, got 150 rows and 149 columns"),
        (K.iloc[::-1], "A has its rows in another order.*'L150'.*'L001'"),
        (K.rename(columns={"L001": "L002"}), "A has column labels that repeat: L002"),
        (K.rename(index={"L001": "L002"}), "A has row labels that repeat: L002"),
        (K.rename(columns={"L001": "Z"}), "A needs the same labels.*L001 is a row"),
        (-K, "A must be positive semi-definite"),
        (K + np.triu(np.ones(K.shape)), "A must be symmetric"),
        (K.where(K < 0.5), "A holds missing or infinite"),
        (K.astype(str) + "x", "A holds values that are not numbers"),
    ],
)
def test_kernels(kernel: pd.DataFrame, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kernel(kernel, "A")


def test_a_kernel_without_some_of_the_levels() -> None:
    term = Term("line", relationship=Kernel(K.iloc[:100, :100], "A"))
    with pytest.raises(ValueError, match=r"Term 'line': The kernel A has no row for 50 levels of the data \(L101"):
        MixedModel("gblup150", "y ~ 1", {"line": term})
