"""How verbs end when they are called with something odd: in success or one line, or else it is collected and told."""

from __future__ import annotations

import contextlib
import io
import signal
import traceback

from scalekd_ds.commands.dispatch import dispatch
from scalekd_ds.errors import UserError

# seconds after which a command waits for what never comes, such as the other end of a pipe
HANGS_AFTER = 60


class TooLongError(BaseException):
    """A command does not end; no handler of errors may take it for one."""


class Ends:
    """How commands end, by situation: what is neither a success nor one line is collected, to be told at the end."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.tried = 0

    def of(self, situation: str, words: list[str]) -> str | None:
        """The one line with which a command ends, or None where it works."""

        def too_long(*_):
            raise TooLongError(f"no end after {HANGS_AFTER} s")

        self.tried += 1
        before = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(HANGS_AFTER)
        # as strict as a file's
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
        try:
            with contextlib.redirect_stdout(out):
                run_verb(words)
        except UserError as error:
            text = " ".join(str(error).split())
            if len(text) < 16 or "Traceback" in text or ("\x1b" in text and "colour" not in situation):
                self.wrong.append(f"{situation}: {text}")
            return text
        except (Exception, SystemExit, TooLongError) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.wrong.append(f"{situation}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})")
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        return None

    def check(self) -> None:
        assert not self.wrong, "\n".join(self.wrong)


def run_verb(words: list[str]) -> None:
    assert dispatch(words) in (None, 0, 1)
