"""What can go wrong in `tenants`, as a tree.

TenantsError
├── KeyRefused          no key, an unknown, revoked or expired one, or one that may not do this
├── AuthUnavailable     a key that nobody here knows yet, while Postgres can't be asked; says nothing about the key
├── NameInvalid         a name that isn't one
├── NotFound            a workspace or key that isn't there
├── Conflict            a name that is taken
└── LedgerUnavailable   the open row could not be made durable; the request must not start
"""

from __future__ import annotations


class TenantsError(Exception):
    """Root of everything that `tenants` raises on purpose."""


class KeyRefused(TenantsError):
    """A key that doesn't open this; the message never contains the key."""


class AuthUnavailable(TenantsError):
    """A key can't be checked now: it isn't cached and Postgres doesn't answer. Never a verdict on the key."""


class NameInvalid(TenantsError):
    """A name that isn't one; the message says what a name is."""


class NotFound(TenantsError):
    """A workspace or key that isn't there."""


class Conflict(TenantsError):
    """A name that is taken."""


class LedgerUnavailable(TenantsError):
    """The ledger can't take an open row now."""
