"""The C code under the compiler's sanitizers: races that were found, a stress test, and fuzzing.

`UFFDAEMON_SANITIZE_SECONDS` and `UFFDAEMON_FUZZ_ROUNDS` make them longer: see ``make sanitize``.
``make fuzz`` hands the fuzzers to libFuzzer instead, which clang brings.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import uffdaemon.native
from tests.support import clib
from tests.support.requirements import unavailable
from uffdaemon.ranges import PAGE_SIZE

HERE = Path(__file__).parent
NATIVE = Path(uffdaemon.native.__file__).parent
SECONDS = int(os.environ.get("UFFDAEMON_SANITIZE_SECONDS", "3"))
ROUNDS = int(os.environ.get("UFFDAEMON_FUZZ_ROUNDS", "20000"))
SANITIZERS = ("thread", "address,undefined")
CASES = (
    "two-wait-for-readers",
    "discarded-while-withdrawn",
    "discarded-and-noted",
    "states-of-pages",
    "forked-and-discarded",
    "a-core-is-sought",
    "told-after-events",
    "told-once",
    "paused-when-full",
    "withdrawn-in-thread",
    "poisoned-in-thread",
    "removed-in-between",
    "never-ours",
    "discarded-while-answered",
    "discarded-while-published",
)
WRAPPED = {
    "stress": (),
    "cases": ("ioctl",),
    "fuzz_messages": ("ioctl", "nanosleep", "clock_gettime"),
    "fuzz_rules": ("ioctl", "nanosleep", "clock_gettime"),
}
PARTS = {
    "stress": ("stress", "books", "churn"),
    "cases": ("cases",),
    "fuzz_messages": ("fuzz_messages", "fuzz_kernel"),
    "fuzz_rules": ("fuzz_rules", "fuzz_kernel"),
}


def build(
    directory: Path, name: str, sanitizer: str, *, compiler: str, driver: tuple[str, ...] = ()
) -> Path:
    """Compile a program together with the library's C sources; where it lies."""
    program = directory / f"{name}-{sanitizer.partition(',')[0]}"
    options = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    options.append(f"-DPAGE={PAGE_SIZE}u")
    checks = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=undefined")
    wraps = (f"-Wl,--wrap={function}" for function in WRAPPED[name])
    parts = (str(HERE / f"{part}.c") for part in (*PARTS[name], *driver))
    sources = (str(path) for path in sorted(NATIVE.glob("*.c")) if path.name != "_native.c")
    command = [compiler, *options, *checks, "-fno-omit-frame-pointer", f"-iquote{NATIVE}", *wraps]
    subprocess.run([*command, *parts, *sources, "-o", str(program)], check=True)
    return program


def run(program: Path, *arguments: str, deadline: float) -> None:
    """Run it in a child; fail on whatever a sanitizer says, and on any other complaint."""
    ended = subprocess.run(
        [str(program), *arguments],
        timeout=deadline,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    print(ended.stdout, end="")
    print(ended.stderr, end="", file=sys.stderr)
    if "unexpected memory mapping" in ended.stderr:
        unavailable("addresses are too random for the sanitizer", "sysctl vm.mmap_rnd_bits=28")
    assert ended.returncode == 0, ended.stderr
    assert "Sanitizer" not in ended.stderr


def _compiler(directory: Path) -> str:
    if not (NATIVE / "serve.c").exists():
        pytest.skip("the package was installed without its C sources")
    found = clib.compiler()
    if found is None:
        pytest.skip("no C compiler; on Debian: apt install gcc")
    source = directory / "nothing.c"
    source.write_text("int main(void) { return 0; }\n")
    for sanitizer in SANITIZERS:
        command = [found, f"-fsanitize={sanitizer}", str(source), "-o", str(directory / "nothing")]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            unavailable(f"{found} has no -fsanitize={sanitizer}", "on Debian: apt install gcc")
    return found


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that has the sanitizers."""
    return _compiler(tmp_path_factory.mktemp("compiler"))


@pytest.mark.kernel
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_each_race_that_was_found(compiler: str, sanitizer: str, tmp_path: Path) -> None:
    program = build(tmp_path, "cases", sanitizer, compiler=compiler)
    for case in CASES:
        run(program, case, deadline=30)


@pytest.mark.kernel
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_everything_at_once(compiler: str, sanitizer: str, tmp_path: Path) -> None:
    program = build(tmp_path, "stress", sanitizer, compiler=compiler)
    for who in ("thread", "in-thread"):
        run(program, who, str(SECONDS), deadline=SECONDS + 60)


@pytest.mark.parametrize("name", ["fuzz_messages", "fuzz_rules"])
def test_arbitrary_input(compiler: str, name: str, tmp_path: Path) -> None:
    program = build(tmp_path, name, "address,undefined", compiler=compiler, driver=("fuzz_driver",))
    run(program, str(ROUNDS), deadline=30 + ROUNDS / 100)


def fuzz(seconds: int) -> int:
    """Have libFuzzer run each fuzzer for `seconds`; the exit status."""
    clang = shutil.which("clang")
    if clang is None:
        print("no clang, which brings libFuzzer; on Debian: apt install clang")
        return 0
    corpus = Path("build/fuzz").resolve()
    for name in ("fuzz_messages", "fuzz_rules"):
        (corpus / name).mkdir(parents=True, exist_ok=True)
        program = build(corpus, name, "fuzzer,address,undefined", compiler=clang)
        limits = (f"-max_total_time={seconds}", "-max_len=2000", f"-artifact_prefix={corpus}/")
        status = subprocess.run([program, *limits, corpus / name], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(fuzz(int(sys.argv[1])))
