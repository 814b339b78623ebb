"""What the ledger raises, told to the caller as a refusal with a status and a code."""

from collections.abc import Iterator
from contextlib import contextmanager

from proxy.core.errors import Conflict, InvalidRequest, NotFound, Unavailable
from proxy.ledger import errors

__all__ = ["ledger_refusals"]


@contextmanager
def ledger_refusals() -> Iterator[None]:
    """Around every use of the ledger here: its exceptions leave as refusals. What is a fault of ours stays one."""
    try:
        yield
    except errors.Unknown as error:
        raise NotFound(_sentence(error), code="not_found") from error
    except errors.Conflict as error:
        raise Conflict(_sentence(error), code="conflict") from error
    except errors.InvalidValue as error:
        raise InvalidRequest(_sentence(error), code="invalid_value") from error
    except errors.LedgerUnavailable as error:
        raise Unavailable(
            "The ledger can't be reached at the moment.", code="ledger_unavailable", headers={"retry-after": "1"}
        ) from error


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
