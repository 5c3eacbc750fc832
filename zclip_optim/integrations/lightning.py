"""Lightning: a callback that clips and logs, for modules whose `configure_optimizers` stays as it is.

It serves `lightning` and `pytorch_lightning`, whichever is installed.
"""

import warnings
from typing import Any

from zclip_optim.checks import refuse_unless_count
from zclip_optim.clipper import ZClip
from zclip_optim.health import WITHOUT_GRADIENTS, ZClipWarning
from zclip_optim.integrations import ShareLog, metrics_to_log, missing_extra
from zclip_optim.optimizer import ZClipOptimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    try:  # the same by its older name; either's trainer takes the other's callbacks
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    except ImportError:
        raise ImportError(missing_extra("lightning")) from error


class ZClipCallback(Callback):
    """Clips gradient-norm spikes of every optimizer of a module, and logs what it did.

    When fitting starts, each optimizer that is not a `ZClipOptimizer` yet is wrapped in one of its own, over the
    parameters of that optimizer only. So the statistics are saved and resumed in the optimizer states of every
    checkpoint, a step of NaN or infinite norm is skipped, closures (LBFGS) are clipped at each evaluation, and under
    "16-mixed" the scaler has unscaled before the norm is measured. `on_before_optimizer_step` sees the gradients before
    clipping.

    At the trainer's logging interval, and only then, the metrics are read and logged as ``zclip/grad_norm``,
    ``clipped_norm``, ``clip_coef``, ``threshold``, ``z_score``, ``mean``, ``std``, ``clip_rate``, ``spike_rate``,
    ``clipped_steps``, ``spike_steps`` and ``skipped_steps``, NaN or infinite where there is no number; and of all steps
    since the log before ``interval_steps``, ``interval_max_norm``, ``interval_min_coef``, ``interval_spikes`` and
    ``interval_skips``, so that a spike between two rows is seen. With several optimizers they are
    ``zclip/0/grad_norm``, ``zclip/1/grad_norm`` and so on.

    Args:
        log_parameters: how many parameters to log as ``zclip/share/<name>`` (``zclip/0/share/<name>``), those with the
            largest shares of the squared norm in the last spike since the log before, >= 1; None: none. With it
            the metrics are read at every step, which on accelerators waits for the device.
        **options: the keyword arguments of `ZClipOptimizer`, with the same meaning, defaults and errors. Optimizers
            that the module has wrapped itself keep their own.

    Raises:
        ValueError: an argument is out of its range; names the argument, the value and the range. When fitting starts,
            the strategy is FSDP1, whose group is not known before: use `ModelParallelStrategy` (FSDP2), or wrap the
            optimizer in `configure_optimizers`.

    Warns:
        ZClipWarning: the trainer has a `gradient_clip_val`, which clips first and hides every spike. Or, at the end, an
            optimizer has not been asked to step.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ZClipCallback(z_thresh=3.0)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, log_parameters: int | None = None, **options: Any) -> None:
        refuse_unless_count("log_parameters", log_parameters)
        ZClip(**options)  # refuses what is out of range
        self.options = options
        self.log_parameters = log_parameters
        self._shares: list[ShareLog] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the optimizers, which exist by now, before Lightning restores their states."""
        if trainer.gradient_clip_val:
            warnings.warn(
                f"gradient_clip_val={trainer.gradient_clip_val} clips before ZClip measures the norm and hides every "
                "spike: remove it; max_grad_norm of ZClip is an absolute cap that does not",
                ZClipWarning,
                stacklevel=2,
            )
        trainer.optimizers = [
            ZClipOptimizer(optimizer, **self.options) if _is_to_be_wrapped(optimizer) else optimizer
            for optimizer in trainer.optimizers
        ]
        self._stop_looking()
        if self.log_parameters is not None:
            self._shares = [ShareLog(each, pl_module, self.log_parameters) for each in _zclips(trainer)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if Lightning hands its metrics to the loggers after this batch."""
        if not _logs_after_this_batch(trainer, pl_module):
            return
        optimizers = _zclips(trainer)
        prefixes = ["zclip/"] if len(optimizers) == 1 else [f"zclip/{i}/" for i in range(len(optimizers))]
        for optimizer, prefix in zip(optimizers, prefixes, strict=True):
            # With NaN and infinity: of what is left out here, Lightning repeats the value of an earlier step.
            pl_module.log_dict(metrics_to_log(optimizer, prefix), on_step=True, on_epoch=False)
        shares: dict[str, float] = {}
        for log, prefix in zip(self._shares, prefixes, strict=False):
            shares.update(log.take(prefix))
        if shares:  # not by log_dict, which would repeat them in the logs of later steps
            for logger in trainer.loggers:
                logger.log_metrics(shares, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of optimizers that were never asked to step."""
        if trainer.fit_loop.total_batch_idx + 1 < WITHOUT_GRADIENTS:
            return
        idle = [str(i) for i, optimizer in enumerate(_zclips(trainer)) if not optimizer._has_stepped]
        if idle:
            warnings.warn(
                f"optimizer {', '.join(idle)} of the trainer has not stepped at all, so nothing was clipped: a module "
                "that steps by itself must take its optimizers from self.optimizers(), not from a place of its own",
                ZClipWarning,
                stacklevel=2,
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave optimizers that the module has wrapped as they were."""
        self._stop_looking()

    def _stop_looking(self) -> None:
        for shares in self._shares:
            shares.end()
        self._shares = []


def _is_to_be_wrapped(optimizer: Any) -> bool:
    """Not if it is already, or what Lightning has where `configure_optimizers` returned none."""
    return not isinstance(optimizer, ZClipOptimizer) and type(optimizer).__name__ != "_MockOptimizer"


def _zclips(trainer: Trainer) -> list[ZClipOptimizer]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, ZClipOptimizer)]


def _logs_after_this_batch(trainer: Trainer, pl_module: LightningModule) -> bool:
    """The condition under which Lightning does; it has no public form."""
    if pl_module.automatic_optimization and trainer.fit_loop._should_accumulate():
        return False
    return bool(trainer.loggers) and trainer._logger_connector.should_update_logs
