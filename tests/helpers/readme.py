"""The README, the page on loggers, trainers and stacks, and their examples."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, PAGE = (
    (ROOT / name).read_text(encoding="utf8") for name in ("README.md", "zclip_optim/integrations/README.md")
)
BLOCKS = re.findall(r"^```python\n(.*?)^```", README + PAGE, flags=re.DOTALL | re.MULTILINE)


def block(text):
    """The one example that has this text in it."""
    (found,) = [block for block in BLOCKS if text in block]
    return found
