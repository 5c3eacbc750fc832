"""The process that test_crash.py kills: resumes, trains, and checkpoints after every step with the README's recipe."""

import os
import re

import torch
from readme import block
from training import make_model, train

from zclip_optim import ZClipOptimizer

STEPS, OUTLIERS = 300, (60, 150, 151, 240)
SAVE, CHECKPOINT, RESUME = re.fullmatch(
    r'.*?(torch\.save\(.*?os\.replace\("last\.pt\.tmp", "(last\.pt)"\).*?\n)(.*)', block("torch.save("), flags=re.DOTALL
).groups()


def make():
    """Model, optimizer, scheduler."""
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def recipe(code, parts):
    """Do it with these parts, in the folder where the process is."""
    exec(code, dict(zip(("model", "optimizer", "scheduler"), parts, strict=True)) | {"torch": torch, "os": os})


def load(parts):
    """Restore the parts; the number of steps done."""
    recipe(RESUME, parts)
    return parts[2].last_epoch


def run(parts, done, after_step=lambda step: None):
    """Train from step `done` to the end."""
    model, optimizer, scheduler = parts
    for step in range(done, STEPS):
        train(model, optimizer, [step], OUTLIERS)
        scheduler.step()
        after_step(step + 1)


def training_process(folder, progress):
    """Resume from the checkpoint in `folder` if there is one, and go on; every checkpoint is told to `progress`."""
    os.chdir(folder)
    torch.set_num_threads(1)
    parts = make()

    def checkpoint(step):
        recipe(SAVE, parts)
        progress.send(step)

    run(parts, load(parts) if os.path.exists(CHECKPOINT) else 0, checkpoint)
