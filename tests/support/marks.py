"""pytest marks that several test files share."""

from __future__ import annotations

import pytest

from scripts.rehearsal import tools

NEEDS_PULUMI = pytest.mark.skipif(tools.find_pulumi() is None, reason="there is no pulumi: run `make prepare-tools`")
