"""What one resolved fault touches in user space: pages, cache lines, and instructions.

A trap leaves caches and TLBs cold, so a handler pays for each page and line that it touches, more
than for what it computes.  These are counted, not timed, and do not depend on the machine: a
handler is run an instruction at a time (ptrace(2)) from one message to the next, or from the first
instruction of its signal handler to the last, and the operands of each instruction are decoded.
What the kernel itself touches (the signal's frame, the message, the ioctl's argument) is not
counted, nor are the pages of the served memory.

On x86-64, with the package capstone, which decodes.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import threading
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import contenders as who
from benchmarks.build import program
from benchmarks.peers.building import Absent
from benchmarks.rows import Row, absent, compare, script
from benchmarks.turns import Client, Side, TurnFailed, image_for, placements

if TYPE_CHECKING:
    from collections.abc import Sequence

CLIENT = Client(pages=131_072, warm=512)
SAMPLES = 7
"""Faults looked at, of which the one that touches least counts: now and then one comes at the end
of a turn, in which a handler also looks around for other work."""
SWITCHES = 2000
"""Context switches after which a handler is in the middle of its work."""
CAPACITY = 16_384
"""Steps, more than any fault takes."""
PATIENCE = 20.0
PAGE, LINE = 4096, 64
REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx"),
    *("rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base"),
    *("ds", "es", "fs", "gs"),
)
"""``struct user_regs_struct``, its fields in order."""
READERS = (who.SLEEPING, who.REREADING, who.LOOP, who.THREAD)
"""Who reads messages; against the yardstick that reads again, since all of ours do."""
SIGNALLED = (who.SIGBUS, who.IN_THREAD)


class Registers(ctypes.Structure):
    """``struct user_regs_struct``: what a thread was about to do."""

    _fields_ = [(name, ctypes.c_uint64) for name in REGISTERS]


class Trace(ctypes.Structure):
    """``struct trace`` of native/steps.c."""

    _fields_ = [
        ("steps", ctypes.POINTER(Registers)),
        ("capacity", ctypes.c_size_t),
        ("vdso", ctypes.c_uint64),
        ("vdso_end", ctypes.c_uint64),
    ]


@dataclass(frozen=True, slots=True)
class Touched:
    """What one fault touched, in numbers of different ones."""

    instructions: int
    code_lines: int
    code_pages: int
    data_lines: int
    data_pages: int

    @property
    def pages(self) -> int:
        """Of code and data."""
        return self.code_pages + self.data_pages

    @property
    def lines(self) -> int:
        """Of code and data."""
        return self.code_lines + self.data_lines

    def __str__(self) -> str:
        return (
            f"code {self.code_pages} pages, {self.code_lines} lines; "
            f"data {self.data_pages} pages, {self.data_lines} lines; "
            f"{self.instructions} instructions"
        )


@cache
def library() -> Any:  # noqa: ANN401  # ctypes has no other name for it
    loaded = ctypes.CDLL(str(program("steps.so")))
    loaded.steps_of_read.restype = ctypes.c_long
    loaded.steps_of_signal.restype = ctypes.c_long
    return loaded


class Decoder:
    """Finds the memory that instructions of one process are about to touch."""

    def __init__(self, process: int) -> None:
        # By name: an extra that benchmarks can do without, and one that has no types.
        capstone: Any = importlib.import_module("capstone")
        self._memory_operand = capstone.CS_OP_MEM
        self._disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        self._disassembler.detail = True
        self._memory = Path(f"/proc/{process}/mem").open("rb", buffering=0)  # noqa: SIM115  # closed by `close`
        self._known: dict[int, Any] = {}

    def close(self) -> None:
        """Look at the process no more."""
        self._memory.close()

    def instruction(self, address: int) -> Any:  # noqa: ANN401  # capstone has no types
        """The decoded instruction at `address`."""
        found = self._known.get(address)
        if found is None:
            self._memory.seek(address)
            code = self._memory.read(15)
            found = next(self._disassembler.disasm(code, address, 1))
            self._known[address] = found
        return found

    def accesses(self, step: Registers) -> list[tuple[int, int]]:
        """(address, bytes) of what the instruction reads and writes."""
        instruction = self.instruction(step.rip)
        word = instruction.mnemonic.split()[-1]
        if word in ("push", "call"):
            found = [(step.rsp - 8, 8)]
        elif word in ("pop", "ret"):
            found = [(step.rsp, 8)]
        else:
            found = []
        if word in ("lea", "nop") or word.startswith("prefetch"):
            return found
        times = max(step.rcx, 1) if instruction.mnemonic.startswith("rep") else 1
        return [
            *found,
            *(
                (self._address(step, instruction, operand.mem), operand.size * times)
                for operand in instruction.operands
                if operand.type == self._memory_operand
            ),
        ]

    @staticmethod
    def _address(step: Registers, instruction: Any, memory: Any) -> int:  # noqa: ANN401  # the same
        def value(register: int) -> int:
            name = instruction.reg_name(register)
            if name == "rip":
                return int(instruction.address + instruction.size)
            return int(getattr(step, name))

        address = int(memory.disp)
        address += value(memory.base) if memory.base else 0
        address += value(memory.index) * memory.scale if memory.index else 0
        segment = instruction.reg_name(memory.segment) if memory.segment else ""
        if segment in ("fs", "gs"):
            address += int(getattr(step, f"{segment}_base"))
        return address & ((1 << 64) - 1)


def count(decoder: Decoder, steps: Sequence[Registers]) -> Touched:
    """What these steps touched."""
    code: set[int] = set()
    data: set[int] = set()
    for step in steps:
        size = decoder.instruction(step.rip).size
        code |= {step.rip // LINE, (step.rip + size - 1) // LINE}
        for address, length in decoder.accesses(step):
            data |= set(range(address // LINE, (address + max(length, 1) - 1) // LINE + 1))
    pages = [len({line * LINE // PAGE for line in lines}) for lines in (code, data)]
    return Touched(len(steps), len(code), pages[0], len(data), pages[1])


def _child(command: Sequence[str]) -> int | None:
    """Our child whose command line begins so."""
    wanted = b"\0".join(word.encode() for word in command) + b"\0"
    for path in Path("/proc/self/task").glob("*/children"):
        for number in path.read_text().split():
            try:
                if Path(f"/proc/{number}/cmdline").read_bytes().startswith(wanted):
                    return int(number)
            except OSError:  # it has ended
                continue
    return None


def _threads(process: int) -> dict[int, str]:
    """The names of a process's threads."""
    return {
        int(path.name): path.joinpath("comm").read_text().strip()
        for path in Path(f"/proc/{process}/task").iterdir()
    }


def _switches(process: int, thread: int) -> int:
    lines = Path(f"/proc/{process}/task/{thread}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


def _vdso(process: int) -> tuple[int, int]:
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            start, end = line.split()[0].split("-")
            return int(start, 16), int(end, 16)
    return 0, 0


def _sample(process: int, *, signalled: bool) -> Touched | None:
    """One fault; None if there was none, or it was disturbed."""
    steps = (Registers * CAPACITY)()
    trace = Trace(steps, CAPACITY, *_vdso(process))
    threads = _threads(process)
    if signalled:
        numbers = (ctypes.c_int * len(threads))(*threads)
        taken = library().steps_of_signal(numbers, len(threads), ctypes.byref(trace))
    else:
        thread = next((n for n, name in threads.items() if name == "uffd-resolver"), process)
        if _switches(process, thread) < SWITCHES:
            return None
        taken = library().steps_of_read(thread, ctypes.byref(trace))
    if taken <= 0:
        return None
    decoder = Decoder(process)
    try:
        return count(decoder, steps[:taken])
    finally:
        decoder.close()


def _samples(process: int, *, signalled: bool) -> list[Touched]:
    found: list[Touched] = []
    end = time.monotonic() + PATIENCE
    while len(found) < SAMPLES and time.monotonic() < end:
        time.sleep(0.02)
        try:
            sample = _sample(process, signalled=signalled)
        except (OSError, StopIteration):
            if not Path(f"/proc/{process}").exists():
                break
            continue
        if sample is not None:
            found.append(sample)
    return found


def observe(side: Side, *, signalled: bool) -> Touched:
    """Let a side resolve faults, and look at some of them.  Raises `TurnFailed`."""
    failures: list[Exception] = []

    def answer() -> None:
        try:
            with image_for(CLIENT) as image:
                side.answer(CLIENT, placements()["same core"], image)
        except (TurnFailed, OSError) as error:
            failures.append(error)

    turn = threading.Thread(target=answer)
    turn.start()
    try:
        process = None
        while process is None and turn.is_alive():
            time.sleep(0.01)
            process = _child(side.command)
        found = [] if process is None else _samples(process, signalled=signalled)
    finally:
        turn.join()
    if failures:
        raise TurnFailed(str(failures[0]))
    if not found:
        raise TurnFailed(f"{side.name}: no fault was seen from beginning to end")
    return min(found, key=lambda touched: touched.lines)


def _unable() -> str | None:
    """Why nothing can be counted here, if so."""
    if platform.machine() != "x86_64":
        return "instructions are decoded on x86-64 only"
    if importlib.util.find_spec("capstone") is None:
        return "there is no capstone; pip install 'uffdaemon[bench]' brings it"
    return None


def _rows(names: Sequence[str], yardstick: str, *, signalled: bool) -> list[Row]:
    seen: dict[str, Touched] = {}
    rows: list[Row] = []
    for name in (yardstick, *(name for name in names if name != yardstick)):
        try:
            seen[name] = observe(who.MAKERS[name](), signalled=signalled)
        except (Absent, TurnFailed) as error:
            rows.append(absent(f"touched by a fault: {name}", who.reason(name, error)))
    if yardstick not in seen:
        return rows
    for what in ("pages", "lines"):
        for name, found in seen.items():
            title = f"{what} touched by a fault"
            row = compare(
                f"{title}: {name}",
                [float(getattr(found, what))],
                [float(getattr(seen[yardstick], what))],
                against=yardstick,
                cores="same core",
                unit=what,
                note=str(found) if what == "pages" else "",
            )
            rows.append(replace(row, group=title, label=name))
    return rows


def measure(rounds: int) -> list[Row]:
    """A row for each handler's pages, and one for its lines."""
    del rounds  # what is counted is the same each time, nearly
    reason = _unable()
    if reason is not None:
        return [absent("touched by a fault", reason)]
    before = os.sched_getaffinity(0)
    # Whoever looks on must not take the core of those whom it looks at.
    os.sched_setaffinity(0, {max(before)})
    try:
        return [
            *_rows(READERS, who.REREADING, signalled=False),
            *_rows(SIGNALLED, who.SIGBUS, signalled=True),
        ]
    finally:
        os.sched_setaffinity(0, before)


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
