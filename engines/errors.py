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
├── EngineUnreachable      an engine that did not answer; before its first byte, so another attempt may be made
├── EngineLost             an engine that went away or silent, or sent nonsense, after its first byte
└── NotAdmitted            a request that got no slot
    ├── QueueFull          too many wait already
    ├── HoldExpired        no slot in time
    ├── LoadFailed         no engine of the pool can be started just now
    └── AdmissionClosed    this gateway takes nothing more
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


class EngineLost(EnginesError):
    """An engine that went away or silent, or sent what it never should, after its first byte."""


class NotAdmitted(EnginesError):
    """A request that got no slot; the message is fit for its caller."""

    def __init__(self, message: str, *, retry_s: float) -> None:
        super().__init__(message)
        self.retry_s = retry_s
        """When it is worth asking again, in seconds from now."""


class QueueFull(NotAdmitted):
    """Too many requests wait for this pool already."""


class HoldExpired(NotAdmitted):
    """No slot became free in time."""

    def __init__(self, message: str, *, retry_s: float, loading: bool) -> None:
        super().__init__(message, retry_s=retry_s)
        self.loading = loading
        """No engine of the pool was ready; otherwise all slots stayed taken."""


class LoadFailed(NotAdmitted):
    """No engine of the pool is ready and the last start failed."""


class AdmissionClosed(NotAdmitted):
    """The gateway drains."""
