"""The Lightning callback in `pytorch_lightning`, Lightning by its older name, with the newer one or without."""

import csv
import importlib
import re
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from training import make_batch, make_model, parameters, train

from zclip_optim import ZClipOptimizer

pytorch_lightning = pytest.importorskip("pytorch_lightning")
from pytorch_lightning.loggers import CSVLogger  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]
OPTIONS = {"warmup_steps": 10, "z_thresh": 2.0}
OUTLIERS, STEPS = (20, 31), 40
CALLBACKS = "zclip_optim.integrations.lightning"


class Module(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make_model()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return adamw(self.net)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("newer_is_installed", [True, False])
def test_a_run_is_that_of_plain_torch_and_is_logged(newer_is_installed, tmp_path, monkeypatch):
    if not newer_is_installed:
        for name in [name for name in sys.modules if re.match(rf"(lightning|{CALLBACKS})($|\.)", name)]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "lightning", None)
    callbacks = importlib.import_module(CALLBACKS)
    assert issubclass(callbacks.ZClipCallback, pytorch_lightning.Callback) != newer_is_installed
    module, logger = Module(), CSVLogger(tmp_path)
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        callbacks=[callbacks.ZClipCallback(log_parameters=1, **OPTIONS)],
        logger=logger,
        max_epochs=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader([make_batch(i, i in OUTLIERS) for i in range(STEPS)], batch_size=None))
    model = make_model()
    optimizer = ZClipOptimizer(adamw(model), **OPTIONS)
    train(model, optimizer, range(STEPS), OUTLIERS)
    assert torch.equal(parameters(module.net), parameters(model))
    assert trainer.optimizers[0].metrics == optimizer.metrics
    with open(logger.experiment.metrics_file_path) as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["zclip/grad_norm"]]) == STEPS
    assert float(rows[-1]["zclip/mean"]) == pytest.approx(optimizer.metrics.mean, rel=1e-6)
    assert any(name.startswith("zclip/share/net.") for name in rows[-1])
