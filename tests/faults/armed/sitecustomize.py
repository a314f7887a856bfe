"""Python imports this at start where PYTHONPATH names this folder: it sends the process a signal at a given moment.

The environment variable MOMENTS is a JSON list of Moment (tests/faults/moments.py). Nothing of the project is imported
here, and no command line is changed: every Python process that inherits the variable is armed.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

Happened = Callable[[str], None]

WRITING = os.O_WRONLY | os.O_RDWR


def text_of(event: str, arguments: Sequence[Any]) -> str | None:
    """An audit event in words, or None for one that no moment asks for."""
    if event == "open":
        path, _, flags = arguments
        return f"open {'w' if flags & WRITING else 'r'} {path}" if isinstance(path, str) else None
    if event in ("import", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"):
        return " ".join([event.removeprefix("os."), *(str(part) for part in arguments[:2] if isinstance(part, str))])
    return "spawn" if event == "subprocess.Popen" else None


FAILPOINTS = "mlra_scale/checkpoint/failpoints.py"
"""Each of its calls names a point of a save; to a moment that is "point NAME"."""


def waiting(moment: dict[str, Any]) -> Happened:
    """Returns what to call with every event in words, until the moment has come."""
    count, lock = 0, threading.Lock()

    def happened(text: str) -> None:
        nonlocal count
        if not fnmatchcase(text, moment["event"]):
            return
        with lock:
            count += 1
            is_now = count == moment["occurrence"]
        if is_now:
            # Once, whatever processes come later: and the proof that it happened.
            try:
                os.close(os.open(moment["mark"], os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            if moment["error"]:
                raise OSError(moment["error"], os.strerror(moment["error"]))
            os.kill(os.getpid(), moment["signal"])

    return happened


def watch_calls(moments: Sequence[dict[str, Any]]) -> None:
    """Waits for calls, from the first import of one of the files on: before, every call of a library would be seen."""
    watched = [
        (FAILPOINTS if moment["event"].startswith("point ") else moment["event"].split()[1], waiting(moment))
        for moment in moments
    ]

    def called(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            for file, happened in watched:
                if code.co_filename.endswith(file):
                    is_point = file == FAILPOINTS and code.co_name == "reached"
                    happened(f"point {frame.f_locals['point']}" if is_point else f"call {file} {code.co_qualname}")

    def begin() -> None:
        threading.setprofile(called)
        sys.setprofile(called)

    modules = {file.removesuffix(".py").replace("/", ".") for file, _ in watched}
    if modules & set(sys.modules):
        begin()
    elif modules:

        def imported(event: str, arguments: Sequence[Any]) -> None:
            if event == "import" and arguments[0] in modules:
                begin()

        sys.addaudithook(imported)


def watch_system(moments: Sequence[dict[str, Any]]) -> None:
    """Waits for events of the interpreter."""
    watched = [waiting(moment) for moment in moments]

    def audited(event: str, arguments: Sequence[Any]) -> None:
        if (text := text_of(event, arguments)) is not None:
            for happened in watched:
                happened(text)

    if watched:
        sys.addaudithook(audited)


def main() -> None:
    """Arms this process with what is meant for it."""
    command, rank = " ".join(sys.orig_argv), os.environ.get("RANK", "0")
    moments = [
        moment
        for moment in json.loads(os.environ.get("MOMENTS", "[]"))
        if moment["program"] in command and str(moment["rank"]) == rank and not os.path.exists(moment["mark"])
    ]
    watch_calls([moment for moment in moments if moment["event"].startswith(("call ", "point "))])
    watch_system([moment for moment in moments if not moment["event"].startswith(("call ", "point "))])


main()
