"""docs/conformance.md speaks of the tests that there are, and of no other."""

from __future__ import annotations

from tests.kernel.table import DOCUMENT
from tests.support.conformance_table import KERNEL_TESTS, TYPES


def test_the_document_has_the_rows_of_the_suite() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith("| ")
    ]
    assert rows[0] == ["test", *TYPES]
    shown = {name: [cell != "-" for cell in cells] for name, *cells in rows[2:]}
    assert shown == {
        name: [column in {kind.value for kind in types} for column in TYPES]
        for name, types in KERNEL_TESTS.items()
    }
    assert {cell for _, *cells in rows[2:] for cell in cells} <= {"pass", "skip", "-"}
