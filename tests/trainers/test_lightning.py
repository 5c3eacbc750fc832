"""The Lightning callback and Fabric, with the real package: every run equals the same run in plain torch."""

import csv
from functools import partial

import lightning
import pytest
import schedulefree
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader
from training import make_batch, make_model, parameters, train_accumulating
from versions import Muon

from zclip_optim import ZClipOptimizer, ZClipWarning, replay
from zclip_optim.integrations.lightning import ZClipCallback
from zclip_optim.logs import read_norms
from zclip_optim.plotting import plot_history
from zclip_optim.records import Records

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]
OPTIONS = {"warmup_steps": 10, "z_thresh": 2.0}
KEYS = ["grad_norm", "clipped_norm", "clip_coef", "threshold", "z_score", "mean", "std", "clip_rate", "spike_rate"]
OUTLIERS = (20, 31)
STEPS = 40


def batches(steps=STEPS):
    return [make_batch(step, step in OUTLIERS) for step in range(steps)]


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


def lbfgs(params):
    return torch.optim.LBFGS(params, lr=0.1, max_iter=4)


def muon_and_adamw(params):
    params = list(params)
    matrices = Muon([p for p in params if p.ndim == 2], lr=0.02)
    return [matrices, adamw([p for p in params if p.ndim != 2])]


class Module(LightningModule):
    """Automatic optimization."""

    def __init__(self, make_optimizer=adamw, wrap=lambda optimizer: optimizer):
        super().__init__()
        self.net, self.make_optimizer, self.wrap = make_model(), make_optimizer, wrap

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return self.wrap(self.make_optimizer(self.net.parameters()))


class TwoOptimizers(Module):
    """Manual optimization; the second optimizer steps on every other batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        x, y = batch
        first.zero_grad()
        second.zero_grad()
        loss = nn.functional.mse_loss(self.net(x), y)
        self.manual_backward(loss)
        self.log("train_loss", loss)
        first.step()
        if batch_idx % 2:
            second.step()

    def configure_optimizers(self):
        return [adamw(self.net[0].parameters()), torch.optim.SGD(self.net[2].parameters(), lr=1e-3, momentum=0.9)]


class MemoryLogger(Logger):
    """Keeps what it is given."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_hyperparams(self, params):
        pass

    def log_metrics(self, metrics, step):
        self.rows.setdefault(step, {}).update(metrics)


def fit(module, callbacks, data=None, ckpt_path=None, logger=False, **options):
    data = batches() if data is None else data
    trainer = Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, "log_every_n_steps": 1, **options},
    )
    trainer.fit(module, DataLoader(data, batch_size=None, shuffle=False), ckpt_path=ckpt_path)
    return trainer


def plain(make_optimizer=adamw, data=None, accumulate=1):
    """The same run in plain torch: parameters, optimizer, and the metrics after every step."""
    model, history = make_model(), []
    optimizer = ZClipOptimizer(make_optimizer(model.parameters()), **OPTIONS)
    data = batches() if data is None else data
    for start in range(0, len(data), accumulate):

        def closure(micro_batches=data[start : start + accumulate]):
            optimizer.zero_grad()
            for x, y in micro_batches:
                loss = nn.functional.mse_loss(model(x), y) / accumulate
                loss.backward()
            return loss

        if make_optimizer is lbfgs:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        history.append(optimizer.metrics)
    return model, optimizer, history


class TestRuns:
    @pytest.mark.parametrize("make_optimizer", [adamw, lbfgs])
    @pytest.mark.parametrize("wrapped_by_the_module", [False, True])
    def test_automatic_optimization(self, make_optimizer, wrapped_by_the_module):
        def wrap(optimizer):
            return ZClipOptimizer(optimizer, **OPTIONS) if wrapped_by_the_module else optimizer

        callback = ZClipCallback() if wrapped_by_the_module else ZClipCallback(**OPTIONS)
        module = Module(make_optimizer, wrap)
        trainer = fit(module, [callback])
        model, optimizer, _ = plain(make_optimizer)
        assert torch.equal(parameters(module.net), parameters(model))
        assert trainer.optimizers[0].metrics == optimizer.metrics
        assert optimizer.metrics.clipped_steps > 0

    def test_several_optimizers_in_one(self, tmp_path):
        def module():
            return Module(muon_and_adamw, lambda parts: ZClipOptimizer(parts, **OPTIONS))

        whole, resumed, logger = module(), module(), MemoryLogger()
        fit(module(), [ZClipCallback()]).save_checkpoint(tmp_path / "last.ckpt")
        resumption = {"ckpt_path": tmp_path / "last.ckpt", "max_epochs": 2}
        trainer = fit(resumed, [ZClipCallback()], logger=logger, **resumption)
        fit(whole, [ZClipCallback()], max_epochs=2)
        model, optimizer, _ = plain(muon_and_adamw, batches() * 2)
        assert torch.equal(parameters(whole.net), parameters(model))
        assert torch.equal(parameters(resumed.net), parameters(model))
        assert trainer.optimizers[0].metrics == optimizer.metrics
        assert optimizer.metrics.clipped_steps > 0
        assert logger.rows[2 * STEPS - 1]["zclip/mean"] == pytest.approx(optimizer.metrics.mean, rel=1e-6)

    def test_accumulation(self):
        module = Module()
        fit(module, [ZClipCallback(**OPTIONS)], accumulate_grad_batches=2)
        model, optimizer, _ = plain(accumulate=2)
        assert optimizer.metrics.step == STEPS // 2
        assert torch.equal(parameters(module.net), parameters(model))

    def test_manual_optimization_clips_each_optimizer_by_its_own_norm(self):
        module, logger = TwoOptimizers(), MemoryLogger()
        fit(module, [ZClipCallback(**OPTIONS)], logger=logger)
        model = make_model()
        first = ZClipOptimizer(adamw(model[0].parameters()), **OPTIONS)
        second = ZClipOptimizer(torch.optim.SGD(model[2].parameters(), lr=1e-3, momentum=0.9), **OPTIONS)
        for step, (x, y) in enumerate(batches()):
            model.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            first.step()
            if step % 2:
                second.step()
        assert torch.equal(parameters(module.net), parameters(model))
        assert second.metrics.clipped_steps > 0
        assert "zclip/0/mean" in logger.rows[0]
        assert "zclip/1/mean" not in logger.rows[0]  # which has not stepped yet
        last = logger.rows[STEPS - 1]
        assert last["zclip/0/mean"] == pytest.approx(first.metrics.mean, rel=1e-6)
        assert last["zclip/1/mean"] == pytest.approx(second.metrics.mean, rel=1e-6)

    def test_a_scheduler_made_around_the_bare_optimizer(self):
        class Scheduled(Module):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        module = Scheduled()
        trainer = fit(module, [ZClipCallback(**OPTIONS)])
        model = make_model()
        optimizer = ZClipOptimizer(adamw(model.parameters()), **OPTIONS)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            scheduler.step()
        assert torch.equal(parameters(module.net), parameters(model))
        assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


class TestMixedPrecision:
    def test_bf16(self):
        module = Module()
        fit(module, [ZClipCallback(**OPTIONS)], precision="bf16-mixed")
        model = make_model()
        optimizer = ZClipOptimizer(adamw(model.parameters()), **OPTIONS)
        for x, y in batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        assert torch.equal(parameters(module.net), parameters(model))
        assert optimizer.metrics.clipped_steps > 0

    @pytest.mark.parametrize("fused", [False, True])
    def test_fp16_measures_unscaled_gradients_and_leaves_overflows_to_the_scaler(self, fused):
        """Lightning replaces precision="16-mixed" by bf16 on the CPU; its plugin and torch's scaler run there."""

        def make_optimizer(params):
            return torch.optim.AdamW(params, lr=1e-2, fused=fused)

        def make_scaler():
            return torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=5)

        module = Module(make_optimizer)
        plugin = MixedPrecision("16-mixed", "cpu", make_scaler())
        trainer = fit(module, [ZClipCallback(**OPTIONS)], plugins=[plugin])
        model, scaler = make_model(), make_scaler()
        optimizer = ZClipOptimizer(make_optimizer(model.parameters()), **OPTIONS)
        for x, y in batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.mse_loss(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(parameters(module.net), parameters(model))
        assert trainer.optimizers[0].metrics == optimizer.metrics
        assert plugin.scaler.get_scale() == scaler.get_scale()
        assert optimizer.metrics.step < STEPS  # there were overflows
        assert optimizer.metrics.skipped_steps == 0
        assert optimizer.metrics.clipped_steps > 0


class TestNonFinite:
    def test_a_nan_step_leaves_parameters_and_optimizer_state_alone(self):
        data = batches()
        data[15] = (data[15][0] * float("nan"), data[15][1])
        module, without = Module(), Module()
        trainer = fit(module, [ZClipCallback(**OPTIONS)], data)
        fit(without, [ZClipCallback(**OPTIONS)], data[:15] + data[16:])
        assert trainer.optimizers[0].metrics.skipped_steps == 1
        assert torch.equal(parameters(module.net), parameters(without.net))
        assert trainer.optimizers[0].state[module.net[0].weight]["step"] == STEPS - 1


class TestResume:
    @pytest.mark.parametrize("make_module", [Module, TwoOptimizers], ids=["automatic", "manual"])
    def test_bit_for_bit(self, make_module, tmp_path):
        whole, half, resumed = make_module(), make_module(), make_module()
        expected = fit(whole, [ZClipCallback(**OPTIONS)], max_epochs=2).optimizers
        first_half = fit(half, [ZClipCallback(**OPTIONS)])
        first_half.save_checkpoint(tmp_path / "last.ckpt")
        second_half = fit(resumed, [ZClipCallback(**OPTIONS)], ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
        assert torch.equal(parameters(resumed.net), parameters(whole.net))
        assert not torch.equal(parameters(resumed.net), parameters(half.net))
        for ours, theirs, before in zip(second_half.optimizers, expected, first_half.optimizers, strict=True):
            assert repr(ours.state_dict()) == repr(theirs.state_dict())
            assert ours.metrics == theirs.metrics
            assert ours.metrics.clipped_steps > before.metrics.clipped_steps > 0

    def test_a_checkpoint_from_before_the_callback(self, tmp_path):
        fit(Module(), []).save_checkpoint(tmp_path / "last.ckpt")
        resumed = Module()
        trainer = fit(resumed, [ZClipCallback(**OPTIONS)], ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
        assert trainer.optimizers[0].metrics.step == STEPS
        assert trainer.optimizers[0].state[resumed.net[0].weight]["step"] == 2 * STEPS

    def test_fitting_again_starts_afresh(self):
        module, callback = Module(), ZClipCallback(**OPTIONS)
        fit(module, [callback])
        trainer = fit(module, [callback], batches(5))
        assert trainer.optimizers[0].metrics.step == 5


def count_reads(monkeypatch):
    """A list that grows with each read after the optimizers were made; each waits for an accelerator."""
    reads, read = [], Records.read

    def counted(self):
        reads.append(1)
        return read(self)

    monkeypatch.setattr(Records, "read", counted)
    monkeypatch.setattr(LightningModule, "on_train_start", lambda self: reads.clear())
    return reads


class TestLogging:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_every_key_at_the_logging_interval(self, accumulate):
        logger = MemoryLogger()
        fit(
            Module(),
            [ZClipCallback(**OPTIONS)],
            logger=logger,
            log_every_n_steps=5,
            accumulate_grad_batches=accumulate,
        )
        _, _, history = plain(accumulate=accumulate)
        assert list(logger.rows) == list(range(4, STEPS // accumulate, 5))
        for step, row in logger.rows.items():
            assert "train_loss" in row
            for key in KEYS:
                assert row[f"zclip/{key}"] == pytest.approx(getattr(history[step], key), rel=1e-6, nan_ok=True)

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_metrics_are_read_at_the_logging_interval_only(self, accumulate, monkeypatch):
        reads = count_reads(monkeypatch)
        options = {"log_every_n_steps": 5, "accumulate_grad_batches": accumulate}
        fit(Module(), [ZClipCallback(**OPTIONS)], logger=MemoryLogger(), **options)
        assert len(reads) == STEPS // accumulate // 5
        fit(Module(), [ZClipCallback(**OPTIONS)], logger=False, **options)
        assert not reads

    @pytest.mark.parametrize("every", [1, 5])
    def test_the_largest_shares_of_the_last_clipped_step_are_logged_once(self, every):
        logger = MemoryLogger()
        fit(Module(), [ZClipCallback(log_parameters=3, **OPTIONS)], logger=logger, log_every_n_steps=every)
        model, seen = make_model(), []
        optimizer = ZClipOptimizer(adamw([("net." + name, p) for name, p in model.named_parameters()]), **OPTIONS)
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            seen.append(optimizer.norms_by_parameter(3) if optimizer.metrics.is_spike else None)
        assert sum(each is not None for each in seen) == optimizer.metrics.clipped_steps > 1
        assert list(logger.rows) == list(range(every - 1, STEPS, every))
        for step, row in logger.rows.items():
            clipped = [each for each in seen[step + 1 - every : step + 1] if each is not None]
            expected = {f"zclip/share/{each.name}": each.share for each in clipped[-1]} if clipped else {}
            assert {key: value for key, value in row.items() if "share" in key} == pytest.approx(expected)

    def test_shares_of_several_optimizers_that_zero_their_gradients_at_once(self):
        class Zeroes(TwoOptimizers):
            def training_step(self, batch, batch_idx):
                super().training_step(batch, batch_idx)
                for optimizer in self.optimizers():
                    optimizer.zero_grad()

        logger = MemoryLogger()
        callback = ZClipCallback(log_parameters=1, **OPTIONS)
        trainer = fit(Zeroes(), [callback], logger=logger)
        keys = {key for row in logger.rows.values() for key in row if "share" in key}
        assert {key.rsplit(".", 1)[0] for key in keys} == {"zclip/0/share/net.0", "zclip/1/share/net.2"}
        assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)

    def test_shares_of_parameters_that_the_optimizer_names_itself(self):
        def named(optimizer):
            return ZClipOptimizer(adamw([(f"mine{i}", p) for i, p in enumerate(optimizer)]), **OPTIONS)

        logger = MemoryLogger()
        fit(Module(list, named), [ZClipCallback(log_parameters=1)], logger=logger)
        keys = {key for row in logger.rows.values() for key in row if "share" in key}
        assert keys
        assert all(key.startswith("zclip/share/mine") for key in keys)

    @pytest.mark.parametrize("log_parameters", [None, 2])
    def test_shares_cost_a_read_per_step_and_only_if_asked_for(self, log_parameters, monkeypatch):
        reads = count_reads(monkeypatch)
        callback = ZClipCallback(log_parameters=log_parameters, **OPTIONS)
        fit(Module(), [callback], logger=MemoryLogger(), log_every_n_steps=5)
        assert len(reads) == STEPS // 5 + (0 if log_parameters is None else STEPS)

    @pytest.mark.parametrize("log_parameters", [None, 1])
    def test_a_spike_between_two_rows_is_in_the_file_whoever_looks(self, log_parameters, tmp_path):
        class Looks(Module):
            def on_train_batch_end(self, *args):
                seen.append(self.trainer.optimizers[0].metrics)

        seen = []
        callback = ZClipCallback(log_parameters=log_parameters, **OPTIONS)
        fit(Looks(), [callback], logger=CSVLogger(tmp_path), log_every_n_steps=10)
        path = next(tmp_path.rglob("metrics.csv"))
        with path.open(encoding="utf8") as file:
            rows = [row for row in csv.DictReader(file) if row["zclip/grad_norm"]]
        assert [int(row["step"]) for row in rows] == [9, 19, 29, 39]
        spikes = [i for i, metrics in enumerate(seen) if metrics.is_spike]
        assert {*OUTLIERS} <= {*spikes}  # steps 20 and 31
        for i, row in enumerate(rows):
            steps = seen[10 * i : 10 * (i + 1)]
            expected = {
                "interval_steps": 10,
                "interval_max_norm": max(m.grad_norm for m in steps),
                "interval_min_coef": min(m.clip_coef for m in steps),
                "interval_spikes": sum(m.is_spike for m in steps),
                "interval_skips": 0,
                **{name: getattr(steps[-1], name) for name in ("clipped_steps", "spike_steps", "skipped_steps")},
            }
            found = {name: float(row[f"zclip/{name}"]) for name in expected}
            assert found == pytest.approx(expected, rel=1e-6)
        assert all(metrics.interval_steps == 1 for metrics in seen)
        _, norms = plot_history(path).axes
        (peaks,) = [line for line in norms.lines if line.get_label().startswith("spikes between rows")]
        drawn = dict(zip(*peaks.get_data(), strict=True))
        assert [drawn[24], drawn[34]] == pytest.approx([seen[step].grad_norm for step in OUTLIERS], rel=1e-6)

    def test_the_file_of_the_csv_logger_can_be_plotted(self, tmp_path):
        fit(Module(), [ZClipCallback(log_parameters=2, **OPTIONS)], logger=CSVLogger(tmp_path))
        path = next(tmp_path.rglob("metrics.csv"))
        header = path.read_text(encoding="utf8").splitlines()[0].split(",")
        assert {"step", "train_loss", "zclip/share/net.0.weight", *(f"zclip/{key}" for key in KEYS)} <= set(header)
        loss, norm = plot_history(path).axes
        assert list(loss.lines[0].get_xdata()) == list(range(STEPS))
        labels = [text.get_text() for text in norm.get_legend().get_texts()]
        _, optimizer, _ = plain()
        assert f"clipped ({optimizer.metrics.clipped_steps})" in labels
        replayed = replay(read_norms(path).norms, **OPTIONS)
        assert len(replayed) == STEPS
        assert replayed[-1].spike_steps == optimizer.metrics.spike_steps > 0


class TestArguments:
    def test_gradient_clip_val_is_warned_of(self):
        with pytest.warns(ZClipWarning, match=r"gradient_clip_val=1\.0 .* hides every spike"):
            fit(Module(), [ZClipCallback()], batches(2), gradient_clip_val=1.0)

    def test_errors_come_at_construction(self):
        with pytest.raises(ValueError, match="alpha must be"):
            ZClipCallback(alpha=2)
        with pytest.raises(TypeError, match="z_treshold"):
            ZClipCallback(z_treshold=2)
        with pytest.raises(ValueError, match=r"^log_parameters must be an integer >= 1 or None, got 0$"):
            ZClipCallback(log_parameters=0)


class TestFabric:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_setup_accumulation_scheduler_save_and_load(self, accumulate, tmp_path):
        def make(fabric):
            model = make_model()
            optimizer = ZClipOptimizer(adamw(model.parameters()), **OPTIONS)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            return (*fabric.setup(model, optimizer), scheduler)

        def run(fabric, model, optimizer, scheduler, start, end):
            for i in range(start, end):
                x, y = batches()[i]
                is_accumulating = (i + 1) % accumulate != 0
                with fabric.no_backward_sync(model, enabled=is_accumulating):
                    fabric.backward(nn.functional.mse_loss(model(x), y) / accumulate)
                if not is_accumulating:
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()

        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        whole = make(fabric)
        run(fabric, *whole, 0, STEPS)

        reference = make_model()
        optimizer = ZClipOptimizer(adamw(reference.parameters()), **OPTIONS)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        train_accumulating(reference, optimizer, scheduler, batches(), accumulate)
        assert torch.equal(parameters(whole[0]), parameters(reference))
        assert whole[1].metrics == optimizer.metrics
        assert optimizer.metrics.clipped_steps > 0

        names, half, resumed = ("model", "optimizer", "scheduler"), make(fabric), make(fabric)
        run(fabric, *half, 0, 24)
        fabric.save(tmp_path / "checkpoint.ckpt", dict(zip(names, half, strict=True)))
        fabric.load(tmp_path / "checkpoint.ckpt", dict(zip(names, resumed, strict=True)))
        run(fabric, *resumed, 24, STEPS)
        assert torch.equal(parameters(resumed[0]), parameters(reference))
        assert resumed[1].metrics == optimizer.metrics

    def test_fp16_with_a_scaler(self):
        def make_scaler():
            return torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=5)

        plugin = lightning.fabric.plugins.MixedPrecision("16-mixed", "cpu", make_scaler())
        fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
        model, optimizer = make_model(), None
        model, optimizer = fabric.setup(model, ZClipOptimizer(adamw(model.parameters()), **OPTIONS))
        reference, scaler = make_model(), make_scaler()
        expected = ZClipOptimizer(adamw(reference.parameters()), **OPTIONS)
        for x, y in batches():
            optimizer.zero_grad()
            fabric.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            expected.zero_grad()
            with torch.autocast("cpu", torch.float16):
                output = reference(x)
            scaler.scale(nn.functional.mse_loss(output.float(), y)).backward()
            scaler.step(expected)
            scaler.update()
        assert torch.equal(parameters(model), parameters(reference))
        assert optimizer.metrics == expected.metrics
        assert expected.metrics.step < STEPS

    def test_a_nan_step_is_skipped_and_said_so(self):
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model = make_model()
        model, optimizer = fabric.setup(model, ZClipOptimizer(adamw(model.parameters())))
        before = parameters(model)
        model(torch.full((1, 6), torch.nan)).sum().backward()
        optimizer.step()
        assert optimizer.step_was_skipped
        assert optimizer.metrics.skipped_steps == 1
        assert torch.equal(parameters(model), before)

    def test_train_and_eval_reach_schedulefree(self):
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model = make_model()
        inner = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
        model, optimizer = fabric.setup(model, ZClipOptimizer(inner))
        optimizer.train()
        for x, y in batches(3):
            fabric.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
        training = parameters(model)
        optimizer.eval()
        assert not torch.equal(parameters(model), training)
        optimizer.train()
        torch.testing.assert_close(parameters(model), training)

    @pytest.mark.parametrize("scaled", [False, True])
    def test_wrapping_what_setup_returned_is_refused(self, scaled):
        """Under a scaler the norm would be that of scaled gradients: 58217 for 1.78."""
        plugin = lightning.fabric.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=[plugin] if scaled else [])
        model = make_model()
        model, optimizer = fabric.setup(model, adamw(model.parameters()))
        with pytest.raises(TypeError, match=r"Wrap first, then prepare: fabric\.setup\(model, ZClipOptimizer"):
            ZClipOptimizer(optimizer)


class TestWarnings:
    def test_wrapping_what_the_trainer_has_wrapped_is_refused(self):
        class Wraps(TwoOptimizers):
            def training_step(self, batch, batch_idx):
                with pytest.raises(TypeError, match=r"from configure_optimizers, or use .*ZClipCallback"):
                    ZClipOptimizer(self.optimizers()[0])
                self.wrapped = True

        module = Wraps()
        fit(module, [], batches(1))
        assert module.wrapped

    @pytest.mark.parametrize("logger", [False, True])
    def test_parameters_that_were_replaced_are_warned_of(self, logger):
        class Replaces(Module):
            def on_train_start(self):
                for layer in (self.net[0], self.net[2]):
                    layer.weight = nn.Parameter(layer.weight.detach())
                    layer.bias = nn.Parameter(layer.bias.detach())

        with pytest.warns(ZClipWarning, match="no parameter of this optimizer had a gradient at the last 20") as caught:
            fit(Replaces(), [ZClipCallback(**OPTIONS)], logger=MemoryLogger() if logger else False)
        assert len([warning for warning in caught if warning.category is ZClipWarning]) == 1

    def test_a_module_that_steps_an_optimizer_of_its_own_is_warned_of(self):
        class Own(TwoOptimizers):
            def training_step(self, batch, batch_idx):
                self.own.zero_grad()
                self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]))
                self.own.step()

            def configure_optimizers(self):
                self.own = adamw(self.net.parameters())
                return self.own

        with pytest.warns(ZClipWarning, match=r"optimizer 0 of the trainer has not stepped at all.* self\.optimizers"):
            fit(Own(), [ZClipCallback()])
        fit(Own(), [ZClipCallback()], batches(5))

    @pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
    def test_a_module_without_an_optimizer_is_left_alone(self):
        class NoOptimizer(Module):
            def configure_optimizers(self):
                return None

        trainer = fit(NoOptimizer(), [ZClipCallback()])
        assert not isinstance(trainer.optimizers[0], ZClipOptimizer)

    @pytest.mark.filterwarnings("ignore:the statistics start afresh:zclip_optim.ZClipWarning")  # until they are loaded
    def test_finetuning_adds_groups_and_resumes(self, tmp_path):
        """When it resumes, it puts back copies of param groups that are older than the checkpoint."""

        class Unfreezes(BaseFinetuning):
            def freeze_before_training(self, pl_module):
                self.freeze(pl_module.net[0])

            def finetune_function(self, pl_module, epoch, optimizer):
                if epoch == 1:
                    self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

        def make():
            return Module(lambda params: adamw([p for p in params if p.requires_grad]))

        ours = partial(ZClipCallback, **OPTIONS)
        for callbacks in (lambda: [Unfreezes(), ours()], lambda: [ours(), Unfreezes()]):
            trainer = fit(make(), callbacks(), max_epochs=2)
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            assert len(trainer.optimizers[0].param_groups) == 2
            resumed = fit(make(), callbacks(), max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
            assert resumed.optimizers[0].metrics.step == 3 * STEPS

    def test_a_learning_rate_finder_uses_up_no_warning(self, tmp_path):
        """It trains, then loads what it had saved."""

        class Equal(Module):
            def training_step(self, batch, batch_idx):
                return self.net[2].bias.sum()  # a gradient of 1, whatever happens

        module = Equal(lambda params: torch.optim.SGD(params, lr=1e-2), ZClipOptimizer)
        module.lr = 1e-2
        data = DataLoader(batches(), batch_size=None)
        off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        trainer = Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=1, default_root_dir=tmp_path, **off)
        with pytest.warns(ZClipWarning, match="clipped before they got here"):
            Tuner(trainer).lr_find(module, data, num_training=30, early_stop_threshold=None)
        with pytest.warns(ZClipWarning, match="clipped before they got here"):
            trainer.fit(module, data)
