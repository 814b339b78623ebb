"""What is undocumented fails the suite."""

import re
from pathlib import Path

from proxy.settings import PREFIX, Settings

DOCS = Path(__file__).parents[1] / "docs"


def test_every_setting_is_documented_and_nothing_else() -> None:
    page = (DOCS / "settings.md").read_text()
    documented = set(re.findall(rf"`({PREFIX}[A-Z_]+)`", page))
    assert documented == {PREFIX + name.upper() for name in Settings.model_fields}
