"""What can go wrong in `engines`, as a tree.

EnginesError
├── SpecInvalid            a model, variant or argument that can't be hosted; says which field and why
│   ├── ModelInvalid       a folder or file that is no model we can serve; names the file
│   └── DoesNotFit         no device is large enough, whatever else runs
├── NotFound               a model, variant or engine that isn't there
├── Conflict               a name that is taken, or something in use
├── TransitionRefused      a state change that the life-cycle table doesn't have
├── LaunchFailed           an engine could not be started or died while starting; carries its last lines
│   └── LaunchRefused      the engine host said no: an older epoch, bad order
├── LeadershipLost         another controller leads, so this one's change was not written
└── EngineUnreachable      an engine that did not answer; before its first byte, so another attempt may be made
"""

from __future__ import annotations


class EnginesError(Exception):
    """Root of everything that `engines` raises on purpose; the message is fit for an operator."""


class SpecInvalid(EnginesError):
    """A model, variant or argument that can't be hosted."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ModelInvalid(SpecInvalid):
    """A folder or file that is no model we can serve; the message names the file."""


class DoesNotFit(SpecInvalid):
    """No device could hold it even if it were empty; the message has the arithmetic."""


class NotFound(EnginesError):
    """Something named that isn't there."""


class Conflict(EnginesError):
    """A name that is taken, or a thing that is still in use."""


class TransitionRefused(EnginesError):
    """A change of state that the life-cycle table doesn't have."""


class LaunchFailed(EnginesError):
    """An engine that could not be started or died while starting."""

    def __init__(self, message: str, *, last_lines: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.last_lines = last_lines


class LaunchRefused(LaunchFailed):
    """The engine host refused the order; nothing was started."""


class LeadershipLost(EnginesError):
    """Another controller leads; nothing was written, and the one that was told so must stop deciding."""


class EngineUnreachable(EnginesError):
    """An engine that did not answer before its first byte."""
