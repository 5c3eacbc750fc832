"""Hugging Face Trainer: a callback that logs what ZClip does, and a Trainer on DeepSpeed, whose engine clips."""

import functools
import math
import warnings
from typing import Any

from zclip_optim.checks import refuse_unless_count
from zclip_optim.clipper import ZClip
from zclip_optim.health import ZClipWarning
from zclip_optim.integrations import ShareLog, metrics_to_log, missing_extra
from zclip_optim.optimizer import ZClipOptimizer

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(missing_extra("transformers")) from error


class ZClipCallback(TrainerCallback):
    """Adds ZClip's metrics to the Trainer's logs of training steps: its loggers, and ``trainer.state.log_history``.

    The keys are ``zclip/grad_norm``, ``clipped_norm``, ``clip_coef``, ``threshold``, ``z_score``, ``mean``, ``std``,
    ``clip_rate``, ``spike_rate``, ``clipped_steps``, ``spike_steps`` and ``skipped_steps``, of the step that is logged;
    and of all steps since the log before ``interval_steps``, ``interval_max_norm``, ``interval_min_coef``,
    ``interval_spikes`` and ``interval_skips``, so that a spike between two rows is seen. Those that are finite numbers
    are logged; the metrics are read on that step only. The optimizer itself clips, saves and resumes without this
    callback.

    `attach` puts it before the Trainer's loggers. With ``callbacks=[ZClipCallback()]`` it comes after them, since the
    Trainer's own callbacks are first: ``log_history`` has the metrics then, the loggers have not.

    Args:
        log_parameters: how many parameters to log as ``zclip/share/<name>``, those with the largest shares of the
            squared norm in the last spike since the log before, >= 1; None: none. With it the metrics are read
            at every step, on every rank, which on accelerators waits for the device.

    Raises:
        ValueError: `log_parameters` is out of its range.
        TypeError: when training starts, if the Trainer's optimizer is not a `ZClipOptimizer`; says how to pass one. On
            DeepSpeed `attach_deepspeed` takes its place, and `log_parameters` must be None.

    Warns:
        ZClipWarning: `max_grad_norm` of the TrainingArguments is not 0: it clips first and hides every spike.

    Example:
        >>> import tempfile, torch
        >>> from transformers import Trainer, TrainingArguments
        >>> arguments = TrainingArguments(tempfile.mkdtemp(), max_grad_norm=0.0, report_to="none")
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4))
        >>> trainer = Trainer(model, arguments, optimizers=(optimizer, None))
        >>> callback = ZClipCallback.attach(trainer)
    """

    def __init__(self, log_parameters: int | None = None) -> None:
        refuse_unless_count("log_parameters", log_parameters)
        self.log_parameters = log_parameters
        self._shares: ShareLog | None = None

    @classmethod
    def attach(cls, trainer: Trainer, **options: Any) -> "ZClipCallback":
        """Add one to a Trainer, as the first of its callbacks, before training.

        Args:
            trainer: the loggers among its callbacks all get the same dict, one after the other.
            **options: the arguments of the callback.

        Returns:
            The callback.
        """
        callback = cls(**options)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the Trainer's settings."""
        optimizer = _find_zclip(kwargs["optimizer"])
        self._stop_looking()
        if self.log_parameters is not None:
            if isinstance(optimizer, ZClip):
                raise TypeError("log_parameters must be None with DeepSpeed, whose engine has the gradients")
            self._shares = ShareLog(optimizer, kwargs["model"], self.log_parameters)
        if args.max_grad_norm:
            warnings.warn(
                f"max_grad_norm={args.max_grad_norm} in the TrainingArguments (1.0 is the default) clips before ZClip "
                "measures the norm and hides every spike: pass max_grad_norm=0.0; max_grad_norm of ZClipOptimizer is "
                "an absolute cap that does not",
                ZClipWarning,
                stacklevel=2,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to the logs of a training step; evaluations and the summary have no ``loss``."""
        if logs is None or "loss" not in logs:
            return
        values = metrics_to_log(_find_zclip(kwargs["optimizer"]))
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # the state file is JSON
        if self._shares is not None:
            values.update(self._shares.take("zclip/"))
        logs.update(values)
        state.log_history[-1].update(values)  # a copy, made before the callbacks are called

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the optimizer as it was."""
        self._stop_looking()

    def _stop_looking(self) -> None:
        if self._shares is not None:
            self._shares.end()
        self._shares = None


def attach_deepspeed(trainer: Trainer, **options: Any) -> ZClip:
    """Clip gradient-norm spikes of a Trainer that runs on DeepSpeed, as `integrations.deepspeed.attach` does.

    The checkpoints of the Trainer keep the statistics and resume them. `ZClipCallback` logs, and refuses to train where
    nothing was attached, such as with the accelerator that a hyperparameter search makes anew.

    Args:
        trainer: before `train`, with ``max_grad_norm=0.0`` in its TrainingArguments and ``"gradient_clipping": "auto"``
            in the config for DeepSpeed; its optimizer is not to be wrapped.
        **options: the keyword arguments of `ZClip`, with the same meaning, defaults and errors.

    Returns:
        The `ZClip`, whose `metrics` are those of the last step.

    Raises:
        ValueError: it does not run on DeepSpeed. When training starts, what `integrations.deepspeed.attach` raises.
    """
    from zclip_optim.integrations.deepspeed import attach_clipper  # of another extra

    if not trainer.is_deepspeed_enabled:
        raise ValueError(
            "the trainer does not run on DeepSpeed: use Trainer(..., optimizers=(ZClipOptimizer(...), None))"
        )
    clipper, prepare = ZClip(**options), trainer.accelerator.prepare

    @functools.wraps(prepare)
    def prepare_and_attach(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        for each in prepared if isinstance(prepared, tuple) else [prepared]:
            if getattr(each, "basic_optimizer", None) is not None:  # not the engine of an evaluation
                attach_clipper(each, clipper)
        return prepared

    trainer.accelerator.prepare = prepare_and_attach  # not in a callback: checkpoints are loaded before the first one
    return clipper


def _find_zclip(optimizer: Any) -> ZClipOptimizer | ZClip:
    """The ZClipOptimizer within the wrappers of Accelerate, or the ZClip that was attached to DeepSpeed's optimizer."""
    inner = optimizer
    while not isinstance(inner, ZClipOptimizer):
        if isinstance(attached := getattr(inner, "zclip", None), ZClip):
            return attached
        if not hasattr(inner, "optimizer"):
            raise TypeError(
                f"the Trainer's optimizer, {type(inner).__name__}, is not a ZClipOptimizer, so nothing would be "
                "clipped: pass Trainer(..., optimizers=(ZClipOptimizer(torch.optim.AdamW(model.parameters(), "
                "lr=...)), None)); with None the Trainer makes its scheduler as usual. On DeepSpeed, call "
                "zclip_optim.integrations.transformers.attach_deepspeed(trainer) before train()"
            )
        inner = inner.optimizer
    return inner
