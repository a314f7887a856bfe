"""Python imports this at start where PYTHONPATH names this folder: it sends the process a signal at a given trigger.

The environment variable TRIGGERS is a JSON list of Trigger (tests/faults/triggers.py). Nothing of the project is
imported here, and no command line is changed: every Python process that inherits the variable is armed.
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
    """An audit event in words, or None for one that no trigger asks for."""
    if event == "open":
        path, _, flags = arguments
        return f"open {'w' if flags & WRITING else 'r'} {path}" if isinstance(path, str) else None
    if event in ("import", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"):
        return " ".join([event.removeprefix("os."), *(str(part) for part in arguments[:2] if isinstance(part, str))])
    return "spawn" if event == "subprocess.Popen" else None


POINTS = "mlra_scale/checkpoint/failpoints.py"
"""Each of its calls names a point of a save; to a trigger that is "point NAME"."""


def waiting(trigger: dict[str, Any]) -> Happened:
    """Returns what to call with every event in words, until the trigger is reached."""
    count, lock = 0, threading.Lock()

    def happened(text: str) -> None:
        nonlocal count
        if not fnmatchcase(text, trigger["event"]):
            return
        with lock:
            count += 1
            is_now = count == trigger["occurrence"]
        if is_now:
            # Once, whatever processes come later: and the proof that it happened.
            try:
                os.close(os.open(trigger["mark"], os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            if trigger["error"]:
                raise OSError(trigger["error"], os.strerror(trigger["error"]))
            os.kill(os.getpid(), trigger["signal"])

    return happened


def watch_calls(triggers: Sequence[dict[str, Any]]) -> None:
    """Waits for calls, from the first import of one of the files on: before, every call of a library would be seen."""
    watched = [
        (POINTS if trigger["event"].startswith("point ") else trigger["event"].split()[1], waiting(trigger))
        for trigger in triggers
    ]

    def called(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            for file, happened in watched:
                if code.co_filename.endswith(file):
                    is_point = file == POINTS and code.co_name == "reached"
                    happened(f"point {frame.f_locals['name']}" if is_point else f"call {file} {code.co_qualname}")

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


def watch_system(triggers: Sequence[dict[str, Any]]) -> None:
    """Waits for events of the interpreter."""
    watched = [waiting(trigger) for trigger in triggers]

    def audited(event: str, arguments: Sequence[Any]) -> None:
        if (text := text_of(event, arguments)) is not None:
            for happened in watched:
                happened(text)

    if watched:
        sys.addaudithook(audited)


def main() -> None:
    """Arms this process with what is meant for it."""
    command, rank = " ".join(sys.orig_argv), os.environ.get("RANK", "0")
    triggers = [
        trigger
        for trigger in json.loads(os.environ.get("TRIGGERS", "[]"))
        if trigger["program"] in command and str(trigger["rank"]) == rank and not os.path.exists(trigger["mark"])
    ]
    watch_calls([trigger for trigger in triggers if trigger["event"].startswith(("call ", "point "))])
    watch_system([trigger for trigger in triggers if not trigger["event"].startswith(("call ", "point "))])


main()
