"""The command line's side of the admin API."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from app.cli import settings
from app.refusal import Refused
from app.settings import Settings
from engines.errors import EnginesError

T = TypeVar("T")

TIMEOUT_S: Final = 60.0
"""For one answer."""


class NotThere(Refused):
    """What was named isn't there (404)."""


class AdminClient:
    """One session with the admin API; an async context. What the server refuses is `Refused`, with its reason."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        self._key = key

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._key}"}, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, path: str, **query: Any) -> Any:
        """One GET; the decoded answer. Parameters that are `None` are left out."""
        return await self._ask("GET", path, query=query)

    async def text(self, path: str, **query: Any) -> str:
        """One GET; the answer as it is."""
        return (await self._send("GET", path, query=query)).decode()

    async def post(self, path: str, body: Any = None) -> Any:
        """One POST; the decoded answer."""
        return await self._ask("POST", path, body=body)

    async def patch(self, path: str, body: Any) -> Any:
        """One PATCH; the decoded answer."""
        return await self._ask("PATCH", path, body=body)

    async def delete(self, path: str) -> Any:
        """One DELETE; the decoded answer, if there is one."""
        return await self._ask("DELETE", path)

    async def all(self, path: str, **query: Any) -> list[Any]:
        """All pages of a list."""
        entries: list[Any] = []
        after: str | None = None
        while True:
            page = await self.get(path, **query, limit=500, after=after)
            entries += page["data"]
            after = page["next"]
            if after is None:
                return entries

    async def _ask(self, method: str, path: str, *, query: Mapping[str, Any] | None = None, body: Any = None) -> Any:
        content = await self._send(method, path, query=query, body=body)
        return msgspec.json.decode(content) if content else None

    async def _send(self, method: str, path: str, *, query: Mapping[str, Any] | None = None, body: Any = None) -> bytes:
        given = {name: str(value) for name, value in (query or {}).items() if value is not None}
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"} if data is not None else {}
        url = URL(f"{self._url}/admin/v1{path}", encoded=True)
        try:
            async with self._session.request(method, url, params=given, data=data, headers=headers) as response:
                content = await response.read()
                if response.status >= 400:
                    raise _refused(response.status, content, self._url)
                return content
        except TimeoutError:
            raise Refused(f"{self._url} did not answer within {TIMEOUT_S:.0f} s") from None
        except (aiohttp.ClientError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise Refused(f"can't reach the admin API at {self._url}: {reason}; is `greenroom up` running?") from None


def _refused(status: int, content: bytes, url: str) -> Refused:
    try:
        detail = str(msgspec.json.decode(content, type=dict[str, Any])["detail"])
    except (msgspec.DecodeError, KeyError):
        return Refused(f"{url} answered {status}, not as Greenroom's admin API does")
    if status == 401:
        return Refused(f"the admin key is refused: {detail}")
    return NotThere(detail) if status == 404 else Refused(detail)


def part(name: str) -> str:
    """A name as one part of a path, whatever was typed. Raises `Refused` for what can't be one."""
    if name in {"", ".", ".."}:
        raise Refused(f"{name!r} is no name")
    return quote(name, safe="")


def admin_url(tree: Settings) -> str:
    """Where the admin API is."""
    return tree.admin_url or f"http://{tree.gateway.operator_host}:{tree.gateway.operator_port}"


def admin_key(tree: Settings) -> str:
    """The operator's key: from the settings or the file that `greenroom migrate` wrote. Raises `Refused`."""
    if tree.admin_key:
        return tree.admin_key
    path = tree.data_path / "admin-key"
    try:
        return path.read_text().strip()
    except OSError as error:
        reason = f"no admin key: {path}: {error.strerror}"
        raise Refused(
            f"{reason}; `greenroom up` or `greenroom migrate` makes one, or set GREENROOM_ADMIN_KEY"
        ) from None


def client(tree: Settings) -> AdminClient:
    """The admin API that the settings name."""
    return AdminClient(admin_url(tree), admin_key(tree))


def run(work: Callable[[AdminClient], Awaitable[T]], tree: Settings | None = None) -> T:
    """Do a command's work with a session, and turn what goes wrong in it into `Refused`."""

    async def connected() -> T:
        async with client(tree or settings()) as admin:
            return await work(admin)

    try:
        return asyncio.run(connected())
    except EnginesError as error:
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None
