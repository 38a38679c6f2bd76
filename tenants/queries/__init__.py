"""All SQL of `tenants`, by table: `workspaces`, `keys`, `ledger`, `usage`.

Functions take an asyncpg connection or pool first, then the workspace. Those that are cross-tenant by nature are named
`all_…` and say why. Times are seconds since the epoch; structs travel as JSON text cast in SQL, so that it doesn't
matter whether a pool has codecs. A change that others cache is announced by NOTIFY in the same transaction.
"""

from __future__ import annotations

from tenants.queries.keys import KEYS_CHANNEL, StoredKey, all_stored_keys, create_key, list_keys, revoke_key
from tenants.queries.ledger import (
    Attempt,
    Closing,
    LeftOpen,
    all_usage_close,
    all_usage_left_open,
    all_usage_lock,
    all_usage_of_gateway,
    all_usage_open,
    all_usage_pending,
    all_usage_withdraw,
    extend_lease,
    remove_dead_instances,
    remove_instance,
)
from tenants.queries.usage import Split, all_usage_sums, sum_usage
from tenants.queries.workspaces import all_workspaces, create_workspace, disable_workspace, get_workspace

__all__ = [
    "KEYS_CHANNEL",
    "Attempt",
    "Closing",
    "LeftOpen",
    "Split",
    "StoredKey",
    "all_stored_keys",
    "all_usage_close",
    "all_usage_left_open",
    "all_usage_lock",
    "all_usage_of_gateway",
    "all_usage_open",
    "all_usage_pending",
    "all_usage_sums",
    "all_usage_withdraw",
    "all_workspaces",
    "create_key",
    "create_workspace",
    "disable_workspace",
    "extend_lease",
    "get_workspace",
    "list_keys",
    "remove_dead_instances",
    "remove_instance",
    "revoke_key",
    "sum_usage",
]
