"""NetworkDataModule: batches of whole groups, the vocabulary of a head, new rows."""

import pytest
import torch

from openreml_nn.covariance import AR1Matrix
from openreml_nn.data import Term, read_table
from openreml_nn.lightning import MixedModelRegressor, NetworkDataModule
from openreml_nn.nn import MLP, MixedModelHead

pytestmark = pytest.mark.filterwarnings("ignore:.*workers:UserWarning")
PUPS = "weight ~ sex + Treatment + scale(Lsize)"


def test_batches_have_whole_groups():
    table = read_table("ratpup")
    data = NetworkDataModule("ratpup", PUPS, ["Litter"], batch_size=100)
    assert data.inputs == ["sex[T.Male]", "Treatment[T.High]", "Treatment[T.Low]", "scale(Lsize)"]
    batches = list(data.train_dataloader())
    assert len(batches) == 4 == len(data.train_dataloader())
    litters = [set(groups["Litter"].tolist()) for _, _, groups in batches]
    assert sum(map(len, litters)) == len(set.union(*litters)) == data.effects["Litter"].num_levels == 27
    x, y, groups = (torch.cat(part) for part in zip(*((x, y, g["Litter"]) for x, y, g in batches), strict=True))
    assert (x.dtype, y.dtype) == (torch.float32, torch.float64)
    names = [data.effects["Litter"].level_names[code] for code in groups]
    rows = sorted(zip(names, y.tolist(), x[:, 0].tolist(), strict=True))
    assert rows == sorted(zip(table["Litter"], table["weight"], (table["sex"] == "Male").astype(float), strict=True))
    assert x[:, 3].mean().item() == pytest.approx(0.0, abs=1e-6)


def test_all_rows_as_one_batch():
    data = NetworkDataModule("sleepstudy", "Reaction ~ Days", {"Subject": Term("Subject", "1 + Days")}, batch_size=None)
    ((x, y, groups),) = data.train_dataloader()
    codes, design = groups["Subject"]
    assert (len(x), len(y), len(codes)) == (180, 180, 180)
    assert torch.equal(design, torch.stack([torch.ones(180), x[:, 0]], dim=1).double())
    effects = data.effects["Subject"]
    assert (effects.effects, effects.G.shape) == (["Intercept", "Days"], (36, 36))


def test_effects_of_visits():
    term = Term("Subject", within="occ", covariance=AR1Matrix)
    data = NetworkDataModule(
        "orthodont", "distance ~ age + Sex", {"Subject": term}, predict_table=read_table("orthodont")
    )
    codes, design = data.training_rows.parts[-1]["Subject"]
    assert torch.equal(design.sum(1), torch.ones(108).double())
    head, y = MixedModelHead(data.effects), data.training_rows.parts[1]
    head.offset = y.mean()
    assert torch.isfinite(head(torch.zeros(108), y, {"Subject": (codes, design)}))


def test_new_rows():
    table = read_table("sleepstudy")
    new = table.iloc[[0, 5]].assign(Subject=["S308", "S999"])
    term = {"Subject": Term("Subject", "1 + Days")}
    data = NetworkDataModule(table, "Reaction ~ scale(Days)", term, validation_table=new, predict_table=new)
    ((x, y, groups),), ((other, same),) = data.val_dataloader(), data.predict_dataloader()
    codes, design = groups["Subject"]
    assert codes.tolist() == [0, -1]
    assert design.tolist() == [[1.0, 0.0], [1.0, 5.0]]  # of an unknown level too, for its variance
    assert y.tolist() == table["Reaction"].iloc[[0, 5]].tolist()
    assert torch.equal(x, other)
    assert torch.equal(same["Subject"][1], design)
    assert x[:, 0].tolist() == pytest.approx(((new["Days"] - 4.5) / table["Days"].std()).tolist())


def test_trains_and_predicts(trainer):
    table = read_table("ratpup")
    new = table.iloc[::6].copy()
    new.iloc[0, new.columns.get_loc("Litter")] = "L99"
    data = NetworkDataModule(
        table.drop(index=new.index), PUPS, ["Litter"], 100, validation_table=new, predict_table=new
    )
    module = MixedModelRegressor(
        MLP(4, [8]), MixedModelHead(data.effects), lambda p: torch.optim.Adam(p, 0.03), refit=True
    )
    run = trainer(max_epochs=20, callbacks=[])
    run.fit(module, data)
    assert run.callback_metrics["val/mse"] < 0.8 * new["weight"].var()
    ((mean, variance),) = run.predict(module, data)
    assert len(mean) == len(new)
    assert variance[0] > variance[1]  # of the new litter
    without = NetworkDataModule(table, PUPS, ["Litter"], 100)
    run = trainer(max_epochs=1, callbacks=[])
    run.fit(MixedModelRegressor(MLP(4, [8]), MixedModelHead(without.effects)), without)
    assert "val/mse" not in run.callback_metrics
    assert run.limit_val_batches == 1.0


def test_few_steps_are_said():
    for size, said in ((322, "is 1 step: the table has 322 rows, and `batch_size` is 322"), (162, "is 2 steps")):
        with pytest.warns(UserWarning, match=said):
            NetworkDataModule("ratpup", PUPS, ["Litter"], size).setup("fit")
    for size in (161, None):
        NetworkDataModule("ratpup", PUPS, ["Litter"], size).setup("fit")


def test_refused():
    with pytest.raises(
        ValueError, match=r"needs inputs and random terms, got no inputs from 'weight ~ 1' and \['Litter'\]"
    ):
        NetworkDataModule("ratpup", "weight ~ 1", ["Litter"])
    with pytest.raises(ValueError, match="and no random terms"):
        NetworkDataModule("ratpup", PUPS, [])
    with pytest.raises(ValueError, match=r"`cluster` must be one of the random terms \['Litter'\], got 'Pen'"):
        NetworkDataModule("ratpup", PUPS, ["Litter"], cluster="Pen")
    with pytest.raises(ValueError, match="Nothing to predict"):
        NetworkDataModule("ratpup", PUPS, ["Litter"]).predict_dataloader()
    with pytest.raises(ValueError, match="Nothing to validate on"):
        NetworkDataModule("ratpup", PUPS, ["Litter"]).setup("validate")
