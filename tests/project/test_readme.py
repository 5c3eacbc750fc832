"""The README's examples, run exactly as printed."""

import csv
import re
from pathlib import Path

import pytest
import pytorch_optimizer
import torch
from lightning.pytorch import LightningModule
from readme import BLOCKS, README, block
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from training import make_batch, make_model, parameters, set_gradients
from versions import needs_muon

from zclip_optim import ZClip, ZClipOptimizer
from zclip_optim.plotting import main, plot_history, plot_norms_by_parameter

STEPS = 60


def ingredients(**others):
    """What the examples take for granted."""
    data = [make_batch(step) for step in range(STEPS)]
    names = {"model": make_model(), "loader": DataLoader(data, batch_size=None), "loss_fn": nn.functional.mse_loss}
    return {**names, "torch": torch, "ZClipOptimizer": ZClipOptimizer, **others}


def stepped():
    """An optimizer that has stepped once."""
    names = ingredients(loader=[make_batch(0)])
    exec(block("import torch\n"), names)
    return names["optimizer"]


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make_model()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


class Regression(nn.Module):
    """As the Trainer wants a model."""

    def __init__(self):
        super().__init__()
        self.net = make_model()

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_plain_torch(capsys):
    names = ingredients()
    exec(block("import torch\n"), names)
    assert names["optimizer"].metrics.step == STEPS
    assert capsys.readouterr().out.startswith("ClipMetrics(grad_norm=")


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*treespec, LeafSpec.*")
def test_lightning():
    module = Module()
    before = parameters(module)
    names = ingredients(lightning_module=module)
    exec(block("from lightning"), names)
    assert names["trainer"].optimizers[0].metrics.step == STEPS
    assert not torch.equal(parameters(module), before)


@pytest.mark.filterwarnings("ignore:.*pin_memory.* argument is set as true but no accelerator")
def test_transformers():
    data = [make_batch(step) for step in range(STEPS)]
    names = ingredients(model=Regression(), dataset=[{"x": x[0], "labels": y[0]} for x, y in data])
    exec(block("from transformers"), names)
    assert names["optimizer"].metrics.step == names["trainer"].state.global_step > 0
    assert names["scheduler"].last_epoch == names["trainer"].state.global_step


@pytest.mark.parametrize(
    ("example", "norm"),
    [pytest.param(block("muon, adamw"), 2.0, marks=needs_muon), (block("pytorch_optimizer"), 2**0.5)],
    ids=["two", "one"],
)
def test_muon_and_adamw(example, norm):
    model = make_model()
    matrices, others = [[p for p in model.parameters() if (p.ndim == 2) is choice] for choice in (True, False)]
    names = ingredients(model=model, matrices=matrices, others=others, pytorch_optimizer=pytorch_optimizer)
    exec(example, names)
    for p in model.parameters():
        set_gradients([p], 1.0)
    names["optimizer"].step()
    assert names["optimizer"].metrics.grad_norm == pytest.approx(norm)


def test_the_engine_without_the_wrapper():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = parameters(model)
    model(torch.ones(1, 6)).sum().backward()
    names = ingredients(model=model, optimizer=optimizer, ZClip=ZClip)
    exec(block("clipper = ZClip()"), names)
    assert names["norm"] > 0
    assert not torch.equal(parameters(model), before)


def test_tensorboard():
    with SummaryWriter("logs") as writer:
        exec(block("add_scalar"), {"optimizer": stepped(), "writer": writer, "step": 3})
    assert any(b"zclip/grad_norm" in path.read_bytes() for path in Path("logs").iterdir())


def test_tensorboard_after_a_clipped_step():
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.AdamW(model.named_parameters(), lr=3e-4), warmup_steps=5)
    for norm in (1.0, 1.1, 0.9, 1.0, 1.1, 50.0):
        set_gradients(model.parameters(), norm)
        optimizer.step()
    with SummaryWriter("logs") as writer:
        names = {"optimizer": optimizer, "writer": writer, "step": 3}
        exec(block("add_scalar"), names)
    assert any(b"zclip/share/2.weight" in path.read_bytes() for path in Path("logs").iterdir())
    (call,) = re.findall(r"`zclip_optim\.plotting\.(plot_norms_by_parameter\(.*?\))`", README)
    exec(call, {"norms": optimizer.norms_by_parameter(), "plot_norms_by_parameter": plot_norms_by_parameter})
    assert Path("norms.png").read_bytes().startswith(b"\x89PNG")


def test_csv_and_its_picture():
    optimizer = stepped()
    rows = [{"step": step, "loss": 2.0, **optimizer.metrics.as_dict()} for step in range(5)]
    with open("metrics.csv", "w", encoding="utf8", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    (arguments,) = re.findall(r"`python -m zclip_optim\.plotting (.*?)`", README)
    main(arguments.split())  # TestCommand of test_plotting.py has it in a process of its own
    picture = Path("zclip.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    (call,) = re.findall(r"`zclip_optim\.plotting\.(plot_history\(.*?\))`", README)
    exec(call, {"rows": rows, "plot_history": plot_history})
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_example_is_run():
    tests = [Path(__file__), *Path(__file__).parents[1].glob("scale/test_*.py")]
    calls = re.findall(r'block\("(.*?)"\)', "".join(test.read_text(encoding="utf8") for test in tests))
    texts = [text.encode().decode("unicode_escape") for text in calls]
    for example in BLOCKS:
        assert any(text in example for text in texts), example
