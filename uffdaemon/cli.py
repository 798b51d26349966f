"""The command `uffdaemon`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

from uffdaemon import __version__
from uffdaemon.check import examine, render

if TYPE_CHECKING:
    from collections.abc import Sequence

_DESCRIPTION: Final = "Serve Linux page faults from Python, with userfaultfd."
_CHECK: Final = "show what this kernel and this user can do, and how to get what is missing"
_DEMO: Final = "restore a real memory image lazily, and show what that saves"
_CHECK_EPILOG: Final = (
    "Changes nothing.  Exit status: 0 if the core works (a userfaultfd can be opened, and a fault "
    "is resolved by copying a page), 1 if not."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The demo parses its own options; argparse would handle --help itself.
    if arguments[:1] == ["demo"]:
        from uffdaemon.demo import main as demo  # noqa: PLC0415  # loads SQLite and much more

        return demo(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return _check(as_json=options.json)
    except BrokenPipeError:
        # The reader has gone.  Without this, Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uffdaemon", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"uffdaemon {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check", help=_CHECK, description=f"{_CHECK.capitalize()}.", epilog=_CHECK_EPILOG
    )
    check.add_argument(
        "--json", action="store_true", help="print JSON; docs/privileges.md describes the keys"
    )
    commands.add_parser("demo", help=_DEMO, add_help=False)
    return parser


def _check(*, as_json: bool) -> int:
    report = examine()
    if as_json:
        sys.stdout.write(json.dumps(report.to_json(), indent=2) + "\n")
    else:
        sys.stdout.write(render(report, colour=_wants_colour()))
    sys.stdout.flush()
    return 0 if report.works else 1


def _wants_colour() -> bool:
    # https://no-color.org: set to anything but the empty string.
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not plain and sys.stdout.isatty()
