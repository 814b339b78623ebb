"""Reading what an operator's program or a client's query sent: each wrong member is one clear 400 that names it.

Amounts are decimal *strings*: a JSON number may have been rounded on its way. Text that PostgreSQL can't keep (NUL,
lone surrogates) is refused here, so that it never becomes a server error there.
"""

import asyncio
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, NoReturn, TypeVar
from uuid import UUID

from starlette.requests import Request

from proxy.core.errors import InvalidRequest, TooLarge
from proxy.core.money import MoneyError, parse_credits

__all__ = [
    "BODY_BYTES_MAX",
    "Fields",
    "check_plain",
    "clean_text",
    "parse_uuid",
    "query_fields",
    "read_fields",
    "receive_fields",
    "storable",
]

BODY_BYTES_MAX = 64 * 1024
TEXT_CHARS_MAX = 200
RECEIVE_SECONDS_MAX = 10.0

Word = TypeVar("Word", bound=str)

_WHOLE = re.compile(r"[0-9]{1,6}\Z", re.ASCII)


class Fields:
    """The members of a JSON object or of a query. Each reader takes one by name; ``done`` refuses what nobody took.

    A reader returns None where the member is missing or null, unless ``required``. All raise InvalidRequest.
    """

    def __init__(self, members: Mapping[str, Any]) -> None:
        self._members = members
        self._taken: set[str] = set()

    def given(self, name: str) -> bool:
        """Whether the member is there at all, null included."""
        return name in self._members

    def take(self, name: str, *, required: bool = False) -> Any:
        """The raw value."""
        self._taken.add(name)
        value = self._members.get(name)
        if value is None and required:
            self.refuse(name, "is required")
        return value

    def text(self, name: str, *, required: bool = False, chars_max: int = TEXT_CHARS_MAX) -> str | None:
        """Text of 1 to ``chars_max`` characters, without control characters."""
        value = self.take(name, required=required)
        if value is None:
            return None
        if not isinstance(value, str):
            self.refuse(name, "must be a string")
        check_plain(name, value, chars_max=chars_max)
        return value

    def required_text(self, name: str, *, chars_max: int = TEXT_CHARS_MAX) -> str:
        """As ``text``, and it has to be there."""
        value = self.text(name, required=True, chars_max=chars_max)
        assert value is not None
        return value

    def amount(self, name: str, *, required: bool = False, zero: bool = False) -> int | None:
        """Microcredits from a decimal string of credits; above 0 unless ``zero``."""
        value = self.take(name, required=required)
        if value is None:
            return None
        if not isinstance(value, str):
            self.refuse(
                name, 'must be a string of decimal credits such as "12.5"; a number could be rounded on its way'
            )
        try:
            amount = parse_credits(value)
        except MoneyError as error:
            self.refuse(name, f"is wrong: {error}")
        if amount == 0 and not zero:
            self.refuse(name, "must be above 0")
        return amount

    def required_amount(self, name: str) -> int:
        """As ``amount``, and it has to be there."""
        amount = self.amount(name, required=True)
        assert amount is not None
        return amount

    def flag(self, name: str) -> bool | None:
        """true or false."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return value

    def words(self, name: str, *, count_max: int = 200) -> frozenset[str] | None:
        """A list of distinct strings, at least one."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            self.refuse(name, "must be a list of strings")
        if not 1 <= len(value) <= count_max:
            self.refuse(name, f"must have 1 to {count_max} entries")
        for word in value:
            if not (1 <= len(word) <= TEXT_CHARS_MAX and clean_text(word)):
                self.refuse(name, f"has an entry that is empty, too long or has control characters: {word[:40]!r}")
        return frozenset(value)

    def seconds(self, name: str, *, most: int) -> int | None:
        """A whole number of seconds from 0 to ``most``."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            self.refuse(name, f"must be a whole number of seconds from 0 to {most}")
        return value

    def whole(self, name: str, *, most: int) -> int | None:
        """A whole number from 0 to ``most``."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            self.refuse(name, f"must be a whole number from 0 to {most}")
        return value

    def one_of(self, name: str, words: Sequence[Word]) -> Word | None:
        """One of these words."""
        value = self.take(name)
        if value is None:
            return None
        found = next((word for word in words if value == word), None)
        if found is None:
            self.refuse(name, f"must be one of {', '.join(words)}")
        return found

    def moment(self, name: str) -> datetime | None:
        """A time with its zone, such as 2027-01-31T12:00:00Z."""
        value = self.take(name)
        if value is None:
            return None
        try:
            moment = datetime.fromisoformat(value)
        except (TypeError, ValueError):
            self.refuse(name, "must be a time such as 2027-01-31T12:00:00Z")
        if moment.tzinfo is None:
            self.refuse(name, "must name its zone, as in 2027-01-31T12:00:00Z")
        # Beyond these years the database's calendar and Python's part ways.
        if not 1970 <= moment.year <= 9000:
            self.refuse(name, "must lie between the years 1970 and 9000")
        return moment.astimezone(UTC)

    def day(self, name: str) -> date | None:
        """A day in UTC, such as 2027-01-31."""
        value = self.take(name)
        if value is None:
            return None
        try:
            day = date.fromisoformat(value)
        except (TypeError, ValueError):
            self.refuse(name, "must be a day such as 2027-01-31")
        if not 1970 <= day.year <= 9000:
            self.refuse(name, "must lie between the years 1970 and 9000")
        return day

    def limit(self, *, default: int = 20, most: int = 100) -> int:
        """The page size of a list, from a query."""
        value = self.take("limit")
        if value is None:
            return default
        if not (isinstance(value, str) and _WHOLE.match(value) and 1 <= int(value) <= most):
            self.refuse("limit", f"must be a whole number from 1 to {most}")
        return int(value)

    def uuid(self, name: str, *, required: bool = False) -> UUID | None:
        """A UUID in its usual form."""
        value = self.take(name, required=required)
        if value is None:
            return None
        found = parse_uuid(value)
        if found is None:
            self.refuse(name, "is not an id")
        return found

    def done(self) -> None:
        """Refuse a member that nobody took: it is most likely a typing error."""
        for name in self._members:
            if name not in self._taken:
                known = ", ".join(sorted(self._taken))
                self.refuse(storable(name)[:60], f"is not known here; known are {known}", code="unknown_parameter")

    def refuse(self, name: str, problem: str, *, code: str = "invalid_value") -> NoReturn:
        """Raise the 400 that names the member."""
        raise InvalidRequest(f"{name} {problem}.", code=code, param=name)


async def read_fields(request: Request, *, bytes_max: int = BODY_BYTES_MAX) -> Fields:
    """The body's members. An empty body is an empty object. Raises InvalidRequest or TooLarge."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > bytes_max:
            raise TooLarge(f"The body is above {bytes_max} bytes.", code="body_too_large")
    if not body.strip():
        return Fields({})
    try:
        value = json.loads(body.decode(), object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {_reason(error)}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    return Fields(value)


async def receive_fields(request: Request) -> Fields:
    """As ``read_fields``, from a client that gets some seconds to send them. Raises InvalidRequest or TooLarge."""
    try:
        async with asyncio.timeout(RECEIVE_SECONDS_MAX):
            return await read_fields(request)
    except TimeoutError:
        raise InvalidRequest(
            f"The body didn't arrive within {RECEIVE_SECONDS_MAX:g} s.",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None


def query_fields(request: Request) -> Fields:
    """The query's members. Raises InvalidRequest where one is given twice."""
    pairs = request.query_params.multi_items()
    for name, count in ((name, sum(1 for other, _ in pairs if other == name)) for name, _ in pairs[:100]):
        if count > 1:
            raise InvalidRequest(f"{storable(name)[:60]} is given twice.", code="invalid_value", param=name[:60])
    return Fields(dict(pairs[:100]))


def check_plain(name: str, text: str | None, *, chars_max: int = TEXT_CHARS_MAX) -> None:
    """Raises InvalidRequest unless the text has 1 to ``chars_max`` characters and ``clean_text`` holds. None passes."""
    if text is None:
        return
    problem = None
    if not 1 <= len(text) <= chars_max:
        problem = f"must have 1 to {chars_max} characters, not {len(text)}"
    elif not clean_text(text):
        problem = "must not contain control characters or lone surrogates"
    if problem is not None:
        raise InvalidRequest(f"{name} {problem}.", code="invalid_value", param=name)


def clean_text(text: str) -> bool:
    """Whether the text can be kept and shown: no control characters (NUL among them), no lone surrogates."""
    return not any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) <= 0xDFFF for char in text)


def storable(text: str) -> str:
    """The text with everything that ``clean_text`` refuses replaced by ``?``."""
    return "".join(char if clean_text(char) else "?" for char in text)


def parse_uuid(text: object) -> UUID | None:
    """The UUID in the usual 36-character form, or None."""
    if not isinstance(text, str) or len(text) != 36:
        return None
    try:
        found = UUID(text)
    except ValueError:
        return None
    # UUID() also takes braces and misplaced hyphens; two spellings of one id would be two ids to a log search.
    return found if str(found) == text.lower() else None


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"the member {storable(name)[:60]!r} stands there twice")
        members[name] = value
    return members


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
