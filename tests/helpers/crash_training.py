"""The process that test_crash.py kills: resumes, trains, and checkpoints after every step with the README's recipe."""

import os
import re
from pathlib import Path

import torch
from training import make_model, train

from zclip_optim import ZClipOptimizer

STEPS, OUTLIERS = 300, (60, 150, 151, 240)
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf8")
SAVE, REPLACE = re.search(r"`(torch\.save\(.*?\))`, then\s+`(os\.replace\(.*?\))`", README).groups()


def make():
    """Model, optimizer, scheduler."""
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def load(parts, path):
    """Restore the parts; the number of steps done."""
    checkpoint = torch.load(path, weights_only=True)
    for part, state in zip(parts, checkpoint["parts"], strict=True):
        part.load_state_dict(state)
    return checkpoint["step"]


def run(parts, done, after_step=lambda step: None):
    """Train from step `done` to the end."""
    model, optimizer, scheduler = parts
    for step in range(done, STEPS):
        train(model, optimizer, [step], OUTLIERS)
        scheduler.step()
        after_step(step + 1)


def training_process(path, progress):
    """Resume from `path` if it is there, and go on; every checkpoint is told to `progress`."""
    torch.set_num_threads(1)
    parts = make()

    def checkpoint(step):
        state = {"step": step, "parts": [part.state_dict() for part in parts]}
        exec(f"{SAVE}; {REPLACE}", {"torch": torch, "os": os, "checkpoint": state, "path": path})
        progress.send(step)

    run(parts, load(parts, path) if os.path.exists(path) else 0, checkpoint)
