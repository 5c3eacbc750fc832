"""torchtitan: its container of optimizers under one ZClip, over all model parts and pipeline stages."""

import dataclasses
import math
from collections import ChainMap
from typing import Any

from zclip_optim.algorithm import ZClipConfig
from zclip_optim.checkpoints import publish
from zclip_optim.gradients import CHOICE, choices
from zclip_optim.health import CLIPPED_BEFORE
from zclip_optim.integrations import missing_extra
from zclip_optim.optimizer import ZClipOptimizer
from zclip_optim.state import from_flat

try:
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.config.override import derive
except ImportError as error:
    raise ImportError(missing_extra("torchtitan")) from error

CLIPS_FIRST = "training.max_norm must be inf, or torchtitan clips before ZClip measures"


class ZClipOptimizersContainer(OptimizersContainer):  # type: ignore[misc]
    """Steps torchtitan's optimizers as one `ZClipOptimizer`, its attribute `zclip`; `attach` puts it into a config.

    Checkpoints have the statistics as ``param_groups.<parameter>.zclip_*`` and load into torchtitan's container.
    ``"zclip": False`` in the `optimizer_kwargs` of a `ParamGroupConfig` leaves its parameters alone.

    Raises:
        ValueError: at the first step, without `attach`, or if all gradients are 0, as with ``training.max_norm = 0``.

    Warns:
        ZClipWarning: the first norm is 1, the default of `training.max_norm`; or `from_bare_checkpoint` was used.
    """

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """torchtitan's and ZClip's options. `from_bare_checkpoint`: load no statistics, from a run without ZClip."""

        zclip: dict[str, Any] = dataclasses.field(default_factory=dict)
        from_bare_checkpoint: bool = False

    def __init__(self, config: Config, *, model_parts: list[Any]) -> None:
        super().__init__(config, model_parts=model_parts)
        self._options, self._is_bare = config.zclip, config.from_bare_checkpoint
        self.sum_over(None)
        self._knows_stages = False

    def sum_over(self, stages: Any) -> None:
        """Sum squared norms over the mesh of the pipeline's stages; None: there are none."""
        group = None if stages is None else stages.get_group()
        self.zclip = ZClipOptimizer(self.optimizers, process_group=group, **self._options)
        self._knows_stages = True

    def step(self, closure: Any = None) -> Any:
        """Clip the gradients if their norm is a spike, then let all optimizers step; or leave the step out."""
        if not self.zclip._has_stepped:
            self._look_at_first_step()
        return self.zclip.step(closure)  # not the inherited step, around which torch has put the same hooks again

    def _look_at_first_step(self) -> None:
        if not self._knows_stages:
            raise ValueError("it is not known whether there are pipeline stages: use attach(config), which finds out")
        norm = math.hypot(*(each.norm for each in self.zclip.norms_by_parameter(limit=None)))
        if norm == 0:
            raise ValueError(f"all gradients are 0 at the first step: {CLIPS_FIRST}, and 0 zeroes the gradients")
        if math.isclose(norm, 1.0, rel_tol=1e-4):
            self.zclip.clipper._health.warn(CLIPPED_BEFORE, f"the first gradient norm is {norm:.4f}: {CLIPS_FIRST}")

    def state_dict(self) -> dict[str, Any]:
        """As torchtitan's, with the statistics for every parameter."""
        publish(self.zclip.clipper, self.zclip.param_groups)
        state_dict: dict[str, Any] = super().state_dict()
        ours = ChainMap(*map(_flat, self.zclip.param_groups)).keys()
        if not ours <= state_dict.keys():
            raise RuntimeError("this torchtitan names what is in a state dict otherwise than 0.3 does: use 0.3")
        asks_for_less = self._is_bare and not self.zclip._has_stepped
        return {key: value for key, value in state_dict.items() if not (asks_for_less and key in ours)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here or of torchtitan's container: then the statistics start afresh."""
        flat, clipper = list(map(_flat, self.zclip.param_groups)), self.zclip.clipper
        groups = [{key.rpartition(".")[2]: state_dict[key] for key in group if key in state_dict} for group in flat]
        saved = from_flat(groups, clipper.config.scope)
        choices(groups)
        with self.zclip._checkpoints.loading(saved):
            super().load_state_dict({**ChainMap(*flat), **state_dict})
        if self._is_bare:
            clipper._health.warn("bare", "from_bare_checkpoint: the statistics start afresh; take it out from now on")
        self._is_bare = False


def _flat(group: dict[str, Any]) -> dict[str, Any]:
    """What is in a param group for ZClip, as torchtitan flattens it: for each parameter, by its name."""
    keys = [key for key in group if key == CHOICE or key.startswith("zclip_")]
    return {f"param_groups.{name}.{key}": group[key] for name in group["param_names"] for key in keys}


def attach(config: Any, **options: Any) -> Any:
    """Have ZClip clip the run of a `Trainer.Config`, and return it; after other changes of its optimizer and model.

    ``def llama3_8b_zclip(): return attach(llama3_8b(), z_thresh=3.0)`` in my_runs.py makes a run of
    ``--module my_runs --config llama3_8b_zclip``.

    Args:
        config: gets the container, a `post_optimizer_build_fn` that tells it of pipeline stages, and no `max_norm`.
        **options: the keyword arguments of `ZClipOptimizer`, but `process_group`.

    Raises:
        TypeError: the optimizer is not torchtitan's own, or was replaced until the run starts.
        ValueError: an option is out of its range.
    """
    ZClipConfig(**options)
    spec, optimizer = config.model_spec, config.optimizer
    if type(optimizer) is not OptimizersContainer.Config:
        raise TypeError(f"config.optimizer must be an OptimizersContainer.Config, got {type(optimizer).__qualname__}")

    def tell(optimizers: Any, model_parts: Any, parallel_dims: Any) -> None:
        if not isinstance(optimizers, ZClipOptimizersContainer):
            raise TypeError(f"config.optimizer was replaced after attach(config): nothing clips {optimizers!r}")
        if spec.post_optimizer_build_fn is not None:
            spec.post_optimizer_build_fn(optimizers, model_parts, parallel_dims)
        optimizers.sum_over(parallel_dims.get_optional_mesh("pp"))

    config.optimizer = derive(optimizer, ZClipOptimizersContainer.Config, zclip=options)
    config.model_spec = dataclasses.replace(spec, post_optimizer_build_fn=tell)
    config.training.max_norm = math.inf
    return config
