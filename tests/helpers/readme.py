"""The README and its examples."""

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def block(text):
    """The one example that has this text in it."""
    (found,) = [block for block in BLOCKS if text in block]
    return found
