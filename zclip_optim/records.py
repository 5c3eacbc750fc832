"""The records of a clipper: where they are kept, which param groups they are of, and who watches them go by."""

import torch

from zclip_optim.algorithm import NormStats, ZClipConfig
from zclip_optim.checks import refuse_meta
from zclip_optim.gradients import ParamGroups
from zclip_optim.health import Health
from zclip_optim.param_groups import KnownGroups, Places
from zclip_optim.running import DeviceState, HostState
from zclip_optim.state import SavedState, StepRecord, fresh_records


class Records:
    """One `StepRecord` per scope, on the device of the gradients; with scope="group" each stays with its param group.

    Args:
        config: hyperparameters.

    Attributes:
        state: where they are.
        health: watches them.
    """

    def __init__(self, config: ZClipConfig) -> None:
        records = fresh_records(None)
        self.state: HostState | DeviceState = HostState(records)
        self.health = Health(config, records)
        self._is_one = config.scope == "global"
        self._groups = KnownGroups()  # that the records are of, one of each, unless there is one of all

    def on(self, device: torch.device | None) -> HostState | DeviceState:
        """The state, where a step on this device goes on; moved there if it is elsewhere."""
        if self.state.device != device:
            self._go_on_from(self.read(), device)
        return self.state

    def read(self) -> list[StepRecord]:
        """The records of the last step. On an accelerator this waits for it, once, and is when warnings are given."""
        refuse_meta(self.state.device)
        records = self.state.read()
        self.health.check_when_read(records)
        return records

    def follow(self, param_groups: ParamGroups, places: Places | None = None) -> None:
        """Bring the records, if each is of a group, into the order of these; `places` says where they are now."""
        if self._is_one or (places is None and self._groups.are(param_groups)):
            return
        if places is None:
            places = self._groups.places_of(param_groups)
        if places != list(range(self.state.n_scopes)):
            self._go_on_from(self._arranged(places), self.state.device)
        self._groups.know(param_groups)

    def places_of(self, param_groups: ParamGroups) -> Places:
        """The place of the record of each of these groups; None: it has none."""
        return self._groups.places_of(param_groups)

    def to_save(self, param_groups: ParamGroups) -> SavedState:
        """What a checkpoint of these param groups has."""
        return SavedState.of(self._arranged([0] if self._is_one else self.places_of(param_groups)))

    def restore(self, saved: SavedState | None, param_groups: ParamGroups | None = None) -> None:
        """Go on from a parsed state, of these groups, or of those that come next; None starts afresh."""
        self._groups = KnownGroups()
        self._go_on_from(fresh_records(saved), self.state.device)
        if param_groups is not None:
            self.follow(param_groups)
        self.health.restart(self.state.read())

    def _arranged(self, places: Places) -> list[StepRecord]:
        """The records in another order; a group that has none starts afresh."""
        records = self.read()
        new = StepRecord.before_any(NormStats(), records[0].counters)
        return [new if place is None or place >= len(records) else records[place] for place in places] or [new]

    def _go_on_from(self, records: list[StepRecord], device: torch.device | None) -> None:
        if (self.state.device, self.state.n_scopes) == (device, len(records)):
            self.state.write(records)
        else:
            self.state = HostState(records) if device is None else DeviceState(records, device)
        self.health.go_on_from(records)
