"""Tables and kernels from names, files and DataFrames."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn.covariance import Levels
from openreml_nn.data import Kernel, bundled_tables, read_table, table_path


def test_every_bundled_table_is_read_and_has_a_source() -> None:
    sources = (table_path("oats").parent / "SOURCES.md").read_text(encoding="utf-8")
    for name in bundled_tables():
        assert len(read_table(name)) > 0
        assert f"`{name}`" in sources


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_files_give_every_digit(tmp_path: Path, suffix: str) -> None:
    t = pd.DataFrame({"g": ["a", "b"], "y": [0.1 + 0.2, 1000000000000.3]})
    file = tmp_path / f"t.{suffix}"
    t.to_parquet(file) if suffix == "parquet" else t.to_csv(file, index=False)
    pd.testing.assert_frame_equal(read_table(str(file)), t, check_exact=True)
    assert read_table(t) is t


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("john_alfa", "did you mean 'john_alpha'.*Bundled tables: .*sleepstudy"),
        ("nowhere.csv", "There is no file 'nowhere.csv'"),
        ("some/where", "There is no file"),
        (__file__, "must be .csv, .csv.gz, .parquet"),
    ],
)
def test_says_what_there_is(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(source)
    with pytest.raises(ValueError, match="There is no bundled table"):
        table_path(source)


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet", "frame", "indexed", "indexed.parquet"])
def test_kernel_from_anything(tmp_path: Path, suffix: str) -> None:
    M = np.random.default_rng(0).normal(size=(3, 5))
    labels = ["1", "NA", "03"]
    indexed = pd.DataFrame(M @ M.T, index=labels, columns=labels)
    frame = indexed.reset_index(names="id")
    file = tmp_path / f"K.{suffix}"
    if suffix.startswith("csv"):
        frame.to_csv(file, index=False)
    elif suffix.endswith("parquet"):
        (indexed if suffix.startswith("indexed") else frame).to_parquet(file)
    source = {"frame": frame, "indexed": indexed}.get(suffix, str(file))
    kernel = Kernel(source)
    assert kernel.labels == labels
    np.testing.assert_array_equal(kernel.K.numpy(), M @ M.T)
    assert "3 labels" in repr(kernel)


def test_kernel_over_levels() -> None:
    kernel = Kernel("gblup150_K")
    some = kernel(Levels(["L007", "L002"]))
    torch.testing.assert_close(some(), kernel.K[[6, 1]][:, [6, 1]])
    with pytest.raises(ValueError, match="gblup150_K has no row for 1 level"):
        kernel(Levels(["L007", "zzz"]))
    with pytest.raises(ValueError, match="repeat: a"):
        Kernel(pd.DataFrame(np.eye(2), index=["a", "a"], columns=["a", "a"]))
