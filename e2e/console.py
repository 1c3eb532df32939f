"""Progress for people: a spinner on a terminal, plain lines in a log. Results go to stdout, progress to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status
from rich.text import Text

PLAIN_EVERY_S = 10.0


class Steps:
    """Says what is going on. `waiting` shows one running step with a changing detail.

    A terminal shows one spinner: what runs beside something else says lines, under a name (`beside`).
    """

    def __init__(self, console: Console | None = None, name: str = "", started: float | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.name = name
        self.started = time.monotonic() if started is None else started

    def beside(self, name: str) -> Steps:
        """For one of several things that go on at once."""
        return Steps(self.console, name, self.started)

    def say(self, text: str) -> None:
        """One line that stays."""
        at, name = time.monotonic() - self.started, f"{self.name}: " if self.name else ""
        self.console.print(Text(f"[{at:5.1f}s] {name}{text}"), highlight=False, soft_wrap=True)

    @contextmanager
    def waiting(self, title: str) -> Iterator[Waiting]:
        """A step that takes a while; the yielded object's `update(detail)` may be called as often as one likes."""
        wait = Waiting(self, title)
        try:
            if self.console.is_terminal and not self.name:
                with self.console.status(Text(title)) as status:
                    wait.status = status
                    yield wait
            else:
                self.say(f"{title} …")
                yield wait
        finally:
            wait.status = None


class Waiting:
    """One running step."""

    def __init__(self, steps: Steps, title: str) -> None:
        self.steps, self.title = steps, title
        self.started = self.last = time.monotonic()
        self.status: Status | None = None

    def update(self, detail: str = "") -> None:
        """Show the detail now on a terminal, every ten seconds in a log."""
        now = time.monotonic()
        text = f"{self.title}: {now - self.started:.0f} s" + (f", {detail}" if detail else "")
        if self.status is not None:
            self.status.update(Text(text[: max(20, self.steps.console.width - 4)]))
        elif now - self.last >= PLAIN_EVERY_S:
            self.last = now
            self.steps.say(text)
