"""ClipMetrics as loggers take it."""

import math

from zclip_optim import ZClip
from zclip_optim.metrics import ClipMetrics


def test_as_dict_is_flat_and_all_floats():
    values = ZClip().metrics.as_dict()
    assert list(values) == [f"zclip/{name}" for name in ClipMetrics.__dataclass_fields__]
    assert all(type(value) is float for value in values.values())
    assert values["zclip/clip_coef"] == 1.0
    assert math.isnan(values["zclip/grad_norm"])
    assert "clip/step" in ZClip().metrics.as_dict(prefix="clip/")


def test_repr_is_one_line():
    assert repr(ZClip().metrics).startswith("ClipMetrics(grad_norm=nan, clipped_norm=nan")
    assert "\n" not in repr(ZClip().metrics)
