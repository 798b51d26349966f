"""What hangs for want of the GIL, and what hangs for other reasons where there is none."""

from __future__ import annotations

from tests.hangs.pattern import HAS_GIL

collect_ignore = ["test_free_threaded.py" if HAS_GIL else "test_gil.py"]
