"""Our definitions against those of the distribution, name by name, where it has them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import uffdaemon.native
from tests.support import clib
from uffdaemon import Advice
from uffdaemon.lowlevel import Code, Features, IoctlSet, PageCategory, RegisterMode
from uffdaemon.uapi import events

if TYPE_CHECKING:
    from collections.abc import Iterable
    from enum import IntEnum, IntFlag

OWN = Path(uffdaemon.native.__file__).with_name("uapi.h")
SYSTEM = "#include <linux/userfaultfd.h>\n#include <linux/fs.h>\n"

pytestmark = pytest.mark.skipif(
    clib.compiler() is None, reason="no C compiler; on Debian: apt install gcc"
)


@pytest.fixture
def own() -> str:
    if not OWN.exists():
        pytest.skip("the wheel holds no C sources")
    return OWN.read_text()


def values(includes: str, expressions: dict[str, str], directory: Path) -> dict[str, int]:
    """What a C program makes of each expression whose key is defined, or that has no key."""
    lines = [
        f'#if {guard}\nprintf("{expression} %llu\\n", (unsigned long long)({expression}));\n#endif'
        for expression, guard in expressions.items()
    ]
    source = directory / "values.c"
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <stdint.h>\n#include <sys/ioctl.h>\n"
        f"{includes}\nint main(void)\n{{\n" + "\n".join(lines) + "\n    return 0;\n}\n"
    )
    compiler = clib.compiler()
    assert compiler is not None
    program = directory / "values"
    subprocess.run([compiler, "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    pairs = (line.rsplit(" ", 1) for line in output.splitlines())
    return {expression: int(value) for expression, value in pairs}


def names_of(header: str) -> list[str]:
    """All that the header defines, but for its own include guard."""
    names = re.findall(r"^#define (\w+)[ \t]+\S", header, re.MULTILINE)
    return [name for name in names if not name.startswith("UFFDAEMON")]


def layouts_of(header: str) -> dict[str, str]:
    """Sizes and offsets of the flat structures, and what is defined where they are known."""
    found: dict[str, str] = {}
    for name, body in re.findall(
        r"^struct (\w+) \{\n((?:    [^{}]*;\n)+)\};", header, re.MULTILINE
    ):
        if name.startswith("uffdio_") and name != "uffdio_range":
            guard = f"defined _{name.upper()}"
        else:
            guard = "1" if name == "uffdio_range" else "defined PAGEMAP_SCAN"
        found[f"sizeof(struct {name})"] = guard
        for fields in re.findall(r"^    [\w ]+? (\w+(?:, \w+)*);", body, re.MULTILINE):
            for field in fields.split(", "):
                found[f"offsetof(struct {name}, {field})"] = guard
    return found


MESSAGE = {
    f"offsetof(struct uffd_msg, {field})": "1"
    for field in (
        "event",
        "arg.pagefault.flags",
        "arg.pagefault.address",
        "arg.pagefault.feat.ptid",
        "arg.fork.ufd",
        "arg.remap.from",
        "arg.remap.to",
        "arg.remap.len",
        "arg.remove.start",
        "arg.remove.end",
    )
} | {"sizeof(struct uffd_msg)": "1"}


def test_our_header_is_that_of_the_distribution(own: str, tmp_path: Path) -> None:
    names = names_of(own)
    assert len(names) > 70
    expressions = {name: f"defined {name}" for name in names} | layouts_of(own) | MESSAGE
    ours = values(f'#include "{OWN}"', expressions, tmp_path)
    theirs = values(SYSTEM, expressions, tmp_path)
    missing = {name for name in expressions if name not in ours}
    assert not missing
    # UFFDIO_API and what is as old were there from the first day.
    assert {"UFFDIO_API", "UFFD_API", "sizeof(struct uffd_msg)", "UFFDIO_COPY"} <= theirs.keys()
    assert {name: ours[name] for name in theirs} == theirs


def members(flags: Iterable[IntFlag | IntEnum], prefix: str) -> dict[str, int]:
    return {f"{prefix}{member.name}": int(member) for member in flags}


PYTHON = (
    members(Features, "UFFD_FEATURE_")
    | members(RegisterMode, "UFFDIO_REGISTER_MODE_")
    | members(PageCategory, "PAGE_IS_")
    | members(events.FaultFlags, "UFFD_PAGEFAULT_FLAG_")
    | members(Code, "_UFFDIO_")
    | {f"_UFFDIO_{bit.name}": int(bit).bit_length() - 1 for bit in IoctlSet}
    | {
        f"UFFD_EVENT_{name}": int(getattr(events, name))
        for name in ("PAGEFAULT", "FORK", "REMAP", "REMOVE", "UNMAP")
    }
)


@pytest.mark.parametrize("which", ["ours", "the distribution's"])
def test_python_has_the_same_values(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    includes = SYSTEM
    if which == "ours":
        request.getfixturevalue("own")
        includes = f'#include "{OWN}"'
    found = values(includes, {name: f"defined {name}" for name in PYTHON}, tmp_path)
    assert {name: PYTHON[name] for name in found} == found
    assert "UFFD_FEATURE_SIGBUS" in found
    if which == "ours":
        assert found.keys() == PYTHON.keys()


def test_advice_has_the_values_of_the_distribution(tmp_path: Path) -> None:
    ours = members(Advice, "MADV_")
    includes = "#include <sys/mman.h>\n#include <linux/mman.h>"
    found = values(includes, {name: f"defined {name}" for name in ours}, tmp_path)
    assert "MADV_DONTNEED" in found
    assert {name: ours[name] for name in found} == found
