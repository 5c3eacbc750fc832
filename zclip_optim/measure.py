"""Measure: from param groups to their gradients and norms, wherever they are; what cannot be measured is refused."""

import itertools
from typing import Any

from zclip_optim.checks import refuse_unknown_shards, refuse_unmeasurable
from zclip_optim.gradients import Gradients, ParamGroups
from zclip_optim.layout import ShardedGradients, ShardGroups, in_use


def gradients_of(param_groups: ParamGroups, scope: str, process_groups: ShardGroups) -> Gradients:
    """The gradients of param groups.

    Raises:
        ValueError: some are shards, and `process_groups` do not say who has the others.
    """
    if not in_use():
        return Gradients(param_groups, scope)
    gradients = ShardedGradients(param_groups, scope, process_groups)
    refuse_unknown_shards(itertools.chain(*gradients.scopes), process_groups)
    return gradients


def measure(param_groups: ParamGroups, scope: str, process_groups: ShardGroups) -> tuple[Gradients, Any]:
    """The gradients of param groups, and what their `norms()` are.

    Raises:
        TypeError: torch cannot measure one of them; names it.
        ValueError: see `gradients_of`.
    """
    gradients = gradients_of(param_groups, scope, process_groups)
    try:
        return gradients, gradients.norms()
    except (RuntimeError, TypeError) as error:
        refuse_unmeasurable(gradients.param_groups, error)
        raise
