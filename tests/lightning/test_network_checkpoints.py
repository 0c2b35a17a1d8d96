"""A training that goes on from a finished one, compared bit by bit with one that was never stopped."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from openreml_nn.lightning import MixedModelRegressor, RandomState
from openreml_nn.lightning.network_checkpoints import what_differs
from openreml_nn.nn import ClusterBatchSampler, Effects, MixedModelHead

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*workers:UserWarning", "ignore:.*val_dataloader:UserWarning", "ignore:The dirpath:UserWarning"
)


def rows(count=150, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, site = torch.randn(count, 3, generator=g), torch.arange(count) % 12
    return TensorDataset(x, x.sum(1) + 0.1 * site + 0.3 * torch.randn(count, generator=g), site)


def loader(data, shuffled):
    """In the order of the global random numbers, or of the sampler's own."""
    if shuffled:
        return DataLoader(data, batch_size=50, shuffle=True)
    return DataLoader(data, batch_sampler=ClusterBatchSampler(data.tensors[2], 50))


def model():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    return MixedModelRegressor(
        network, MixedModelHead({"site": Effects(12)}), lambda p: torch.optim.Adam(p, lr=0.02), refit=True,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*different rows of the same levels:UserWarning")
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("validation", [False, True])
def test_goes_on_as_if_it_had_never_stopped(trainer, tmp_path, shuffled, validation):
    class Losses(L.Callback):
        def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    def train(epochs, folder, checkpoint=None):
        saved = ModelCheckpoint(tmp_path / folder, save_last=True)
        run = trainer(max_epochs=epochs, callbacks=[Losses(), RandomState(), saved], enable_checkpointing=True)
        held_out = DataLoader(rows(60, seed=1), batch_size=20) if validation else None
        module = model()
        torch.manual_seed(0 if checkpoint is None else 5)  # of the latter nothing may be left
        run.fit(module, loader(rows(), shuffled), held_out, ckpt_path=checkpoint)
        return run, module

    losses: list[float] = []
    whole = train(4, "whole")[1].state_dict()
    expected, losses = losses, []
    run, first = train(2, "part")
    run.save_checkpoint(tmp_path / "after.ckpt")
    at_refit, so_far = first.head.variance(), losses
    for path in (tmp_path / "part" / "last.ckpt", tmp_path / "after.ckpt"):
        losses = list(so_far)
        run, module = train(4, path.stem, path)
        assert losses == expected
        assert len(losses) == run.global_step == 12
        assert module.head.variance() != at_refit
        again = module.state_dict()
        assert again.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.equal(again[name], value) if isinstance(value, torch.Tensor) else again[name] == value


def test_a_finished_training_predicts_by_its_refit(trainer, tmp_path):
    module = model()
    run = trainer(max_epochs=1, callbacks=[])
    run.fit(module, loader(rows(), False))
    run.save_checkpoint(tmp_path / "after.ckpt")
    again = MixedModelRegressor.load_from_checkpoint(
        tmp_path / "after.ckpt", network=model().network, head=model().head
    )
    assert again.head.variance() == module.head.variance()
    estimates = module.result.variance.set_index("name")["estimate"].to_dict()
    assert again.head.variance() == pytest.approx(estimates)
    again.make_optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    again.refit = False
    trainer(max_epochs=1, callbacks=[]).fit(
        again, loader(rows(), False)
    )  # a training of its own: from what it was given
    assert again.head.variance() == module.head.variance()


def test_what_differs_from_a_network_of_other_sizes():
    saved, own = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    told = what_differs(saved.state_dict(), own.state_dict(), most=2)
    assert told == "0.weight is 5 x 3 there and 4 x 3 here; 0.bias is 5 there and 4 here; 1 more differ"
    told = what_differs(saved.state_dict(), nn.Sequential(nn.Linear(3, 5)).state_dict())
    assert told == "1.weight is 1 x 5 there and none here; 1.bias is 1 there and none here"
    assert what_differs({"a": torch.tensor(1.0)}, {"a": nn.LazyLinear(2).weight}) == "a is a number there and none here"


def test_a_checkpoint_of_another_network_is_refused():
    module = MixedModelRegressor(nn.Linear(3, 1), MixedModelHead({"site": Effects(4)}))
    other = MixedModelRegressor(nn.Linear(2, 1), MixedModelHead({"site": Effects(4)}))
    with pytest.raises(ValueError, match=r"of another model: network.weight is 1 x 2 there and 1 x 3 here. Give"):
        module.load_state_dict(other.state_dict())
