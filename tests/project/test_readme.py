"""The README and the page on loggers, trainers and stacks: their form, their links, and their examples as printed."""

import csv
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from readme import BLOCKS, PAGE, README, ROOT, block
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from training import make_batch, make_model, parameters, set_gradients
from versions import needs_muon

from zclip_optim import ClipMetrics, ZClip, ZClipOptimizer
from zclip_optim.integrations import LOGGED
from zclip_optim.plotting import main, plot_history, plot_norms_by_parameter

STEPS = 60
FOLDERS = {"README": (README, ROOT), "page": (PAGE, ROOT / "zclip_optim" / "integrations")}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


@pytest.mark.parametrize("name", FOLDERS)
def test_no_line_is_long(name):
    assert [line for line in FOLDERS[name][0].splitlines() if len(line) > 120] == []


def links(text):
    """What is linked to by Markdown and by HTML."""
    found = re.findall(r"\]\(([^)]+)\)|^\[[^\]]+\]: (\S+)|(?:src|srcset)=\"([^\"]+)\"", text, flags=re.MULTILINE)
    return ["".join(each) for each in found if "://" not in "".join(each)]


def anchors(text):
    """Of the headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("name", FOLDERS)
def test_links_resolve(name):
    text, folder = FOLDERS[name]
    assert links(text)
    for link in links(text):
        path, _, anchor = link.partition("#")
        assert (folder / path).exists(), link
        assert not anchor or anchor in anchors((folder / path).read_text(encoding="utf8")), link


def test_references_are_defined_and_used():
    defined = set(re.findall(r"^\[([^\]]+)\]: ", README, flags=re.MULTILINE))
    assert defined == set(re.findall(r"\(\[(\w+)\]\)", README))


def test_the_page_has_every_key_and_says_which_are_not_logged():
    rows = PAGE.partition("| key, after `zclip/` | meaning |")[2].partition("\n\n")[0].splitlines()[2:]
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(keys) == sorted(field.name for field in dataclasses.fields(ClipMetrics))
    (left_out,) = re.findall(r"log\s+all\s+keys\s+but\s(.*?)\.$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert set(LOGGED) == set(keys) - set(re.findall(r"`(\w+)`", left_out))


def ingredients(**others):
    """What the examples take for granted."""
    data = [make_batch(step) for step in range(STEPS)]
    names = {"model": make_model(), "loader": DataLoader(data, batch_size=None)}
    return {**names, "torch": torch, "ZClipOptimizer": ZClipOptimizer, **others}


def stepped():
    """An optimizer that has stepped once."""
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4))
    norm_of_one_step(optimizer, model)
    return optimizer


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
    names = {}
    exec(block("import os, torch\n"), names)
    optimizer = names["optimizer"]
    assert optimizer.metrics.step == names["scheduler"].last_epoch == 200
    said = capsys.readouterr().out
    named = re.findall(r"zclip/\w+", re.search(r"print\(.*", block("import os, torch\n"))[0])
    assert all(f"'{key}': " in said for key in named)
    assert len(named) == 3
    assert [each.name for each in optimizer.norms_by_parameter()] == ["weight", "bias"]
    assert os.listdir() == ["last.pt"]


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
    assert names["trainer"].lr_scheduler.last_epoch == names["trainer"].state.global_step


def matrices_and_others(model):
    return [[p for p in model.parameters() if (p.ndim == 2) is choice] for choice in (True, False)]


def norm_of_one_step(optimizer, model):
    """Where every parameter, of which there are four, has a gradient of norm 1."""
    for p in model.parameters():
        set_gradients([p], 1.0)
    optimizer.step()
    return optimizer.metrics.grad_norm


@needs_muon
def test_muon_and_adamw():
    model = make_model()
    matrices, others = matrices_and_others(model)
    names = ingredients(matrices=matrices, others=others)
    exec(block("muon, adamw"), names)
    assert norm_of_one_step(names["optimizer"], model) == pytest.approx(2.0)
    rates = [group["lr"] for group in names["optimizer"].param_groups]
    for scheduler in names["schedulers"]:
        scheduler.step()
    assert all(group["lr"] < rate for group, rate in zip(names["optimizer"].param_groups, rates, strict=True))


def test_a_group_that_something_else_clips():
    model = make_model()
    body, clipped_elsewhere = matrices_and_others(model)
    names = ingredients(body=body, clipped_elsewhere=clipped_elsewhere)
    exec(block("clipped_elsewhere"), names)
    assert norm_of_one_step(names["optimizer"], model) == pytest.approx(2**0.5)


def test_adapters_first():
    names = ingredients(peft=peft, lora_config=peft.LoraConfig(r=2, target_modules=["0", "2"]))
    exec(block("peft.get_peft_model"), names)
    model = names["model"]
    model(torch.ones(1, 6)).sum().backward()
    names["optimizer"].step()
    assert names["optimizer"].metrics.step == 1
    assert len(names["trained"]) == 4


def test_a_subclass_where_a_class_is_wanted():
    names = ingredients()
    exec(block("class ClippedAdamW"), names)
    assert norm_of_one_step(names["ClippedAdamW"](names["model"].parameters(), lr=0.1), names["model"]) == 2.0


def test_a_gan():
    generator, critic = make_model(), make_model()
    names = ingredients(generator=generator, critic=critic)
    exec(block("for_generator"), names)
    norm_of_one_step(names["for_generator"], generator)
    assert names["for_critic"].metrics.step == 0


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
    (call,) = re.findall(r"`zclip_optim\.plotting\.(plot_norms_by_parameter\(.*?\))`", PAGE)
    exec(call, {"norms": optimizer.norms_by_parameter(), "plot_norms_by_parameter": plot_norms_by_parameter})
    assert Path("norms.png").read_bytes().startswith(b"\x89PNG")


def write_csv(path):
    """Rows as a loop of one's own writes them."""
    optimizer = stepped()
    rows = [{"step": step, "loss": 2.0, **optimizer.metrics.as_dict()} for step in range(5)]
    with open(path, "w", encoding="utf8", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return rows


def test_a_csv_file_whose_columns_come_with_the_steps():
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=1)
    with open("rows.csv", "w+", encoding="utf8", newline="") as file:
        names = {"optimizer": optimizer, "csv": csv, "dataclasses": dataclasses, "file": file}
        exec(block("csv.DictWriter"), names)
        for norm in (1.0, 1.1):
            set_gradients(model.parameters(), norm)
            optimizer.step()
            names["table"].writerow(optimizer.metrics.as_dict())
        file.seek(0)
        rows = list(csv.DictReader(file))
    assert [row["zclip/grad_norm"] != "" for row in rows] == [False, True, True]
    assert [row["zclip/threshold"] != "" for row in rows] == [False, False, True]


def test_replay():
    write_csv("metrics.csv")
    (arguments,) = re.findall(r"`python (-m zclip_optim\.replay .*?)`", README)
    subprocess.run([sys.executable, *arguments.split()], check=True)
    assert Path("replay.png").read_bytes().startswith(b"\x89PNG")


def test_csv_and_its_picture():
    rows = write_csv("metrics.csv")
    (arguments,) = re.findall(r"`python -m zclip_optim\.plotting (.*?)`", PAGE)
    main(arguments.split())  # TestCommand of test_plotting.py has it in a process of its own
    picture = Path("zclip.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    (call,) = re.findall(r"`zclip_optim\.plotting\.(plot_history\(.*?\))`", PAGE)
    exec(call, {"rows": rows, "plot_history": plot_history})
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_example_is_run():
    tests = [Path(__file__), *(ROOT / "tests" / "scale").glob("test_*.py")]
    calls = re.findall(r'block\("(.*?)"\)', "".join(test.read_text(encoding="utf8") for test in tests))
    texts = [text.encode().decode("unicode_escape") for text in calls]
    for example in BLOCKS:
        assert any(text in example for text in texts), example
