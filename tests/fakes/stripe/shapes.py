"""What Stripe's API takes and gives, as stripe-python declares it: so the fake knows no parameter and no field that the
library's version doesn't, and leaves none out.

``conform`` turns a decoded form into typed parameters, by the library's TypedDicts. ``whole`` makes a resource with
each of its fields, by the library's classes.
"""

import functools
import sys
import types
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, ForwardRef, Literal, NotRequired, Required, Union, get_args, get_origin

import stripe
from stripe._request_options import RequestOptions
from typing_extensions import is_typeddict

from tests.fakes.stripe.errors import Refused, invalid

__all__ = ["Form", "Object", "conform", "fields_of", "whole"]

Object = dict[str, Any]
Form = dict[str, Any]
"""Decoded from ``a[b][0]=c``: strings, and dicts of them. A list is a dict whose keys are numbers."""

OPTIONS = frozenset(RequestOptions.__annotations__)


def conform(form: Form, shape: Any) -> dict[str, Any]:
    """Typed parameters. Raises Refused (400, not remembered) for one that is unknown, missing or of another type."""
    found: dict[str, Any] = _typed_dict(form, shape, "")
    return found


def _typed_dict(value: Any, shape: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, "an object", value)
    hints = _hints(shape)
    found = {}
    for name, inner in value.items():
        if name not in hints:
            raise _before(f"Received unknown parameter: {_at(path, name)}", "parameter_unknown", _at(path, name))
        found[name] = _conform(inner, hints[name], _at(path, name))
    for name in sorted(shape.__required_keys__ - OPTIONS):
        if name not in value:
            raise _before(f"Missing required param: {_at(path, name)}.", "parameter_missing", _at(path, name))
    return found


def _conform(value: Any, hint: Any, path: str) -> Any:
    if is_typeddict(hint):
        return _typed_dict(value, hint, path)
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (NotRequired, Required):
        return _conform(value, inner[0], path)
    if origin in (Union, types.UnionType):
        return _one_of(value, inner, path)
    if origin is Literal:
        if value in [str(one) for one in inner]:
            return value
        raise _wrong(path, f"one of {', '.join(map(str, inner))}", value)
    if origin in (list, tuple):
        return _sequence(value, inner[0], path)
    if isinstance(hint, type) and hint in SCALARS:
        return SCALARS[hint](value, path)
    # UntypedStripeObject and Dict: names that are the caller's own, metadata above all.
    return _texts(value, path)


def _one_of(value: Any, hints: tuple[Any, ...], path: str) -> Any:
    refusal: Refused | None = None
    # A string fits last: what else it could be is what is meant.
    for hint in sorted(hints, key=lambda one: one is str):
        try:
            return _conform(value, hint, path)
        except Refused as e:
            refusal = e
    assert refusal is not None
    raise refusal


def _sequence(value: Any, hint: Any, path: str) -> list[Any]:
    if not isinstance(value, dict) or not all(name.isdigit() for name in value):
        raise _wrong(path, "an array", value)
    return [_conform(value[name], hint, _at(path, name)) for name in sorted(value, key=int)]


def _texts(value: Any, path: str) -> dict[str, str]:
    if value == "":
        return {}
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise _wrong(path, "an object of strings", value)
    if len(value) > 50 or any(len(name) > 40 or len(one) > 500 for name, one in value.items()):
        raise _before("Metadata takes 50 keys of 40 characters, with values of 500.", "parameter_invalid", path)
    return dict(value)


def _integer(value: Any, path: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise _before(f"Invalid integer: {value}", "parameter_invalid_integer", path) from None


def _boolean(value: Any, path: str) -> bool:
    if value not in ("true", "false"):
        raise _before(f"Invalid boolean: {value}", "parameter_invalid_boolean", path)
    return bool(value == "true")


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _wrong(path, "a string", value)
    return value


SCALARS = {int: _integer, bool: _boolean, str: _text, Decimal: _text}


def _at(path: str, name: str) -> str:
    return f"{path}[{name}]" if path else name


def _wrong(path: str, expected: str, value: Any) -> Refused:
    return _before(f"Invalid {path}: {value!r} must be {expected}", "parameter_invalid", path)


def _before(message: str, code: str, param: str) -> Refused:
    return invalid(message, code=code, param=param, stored=False)


@functools.cache
def _hints(shape: Any) -> Mapping[str, Any]:
    names = vars(sys.modules[shape.__module__])
    return {name: _resolved(hint, names) for name, hint in shape.__annotations__.items() if name not in OPTIONS}


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """With its forward references looked up, at each depth."""
    if isinstance(hint, ForwardRef):
        return _resolved(eval(hint.__forward_code__, names), names)
    inner = get_args(hint)
    if not inner or get_origin(hint) is Literal:
        return hint
    resolved = tuple(_resolved(one, names) for one in inner)
    if get_origin(hint) in (Union, types.UnionType):
        return Union[resolved]  # noqa: UP007 - of a number of them
    origin: Any = get_origin(hint)
    return origin[resolved[0] if len(resolved) == 1 else resolved]


def fields_of(kind: type[stripe.StripeObject]) -> Mapping[str, bool]:
    """Each field's name, and whether it may be null."""
    return {
        name: type(None) in get_args(hint)
        for name, hint in kind.__annotations__.items()
        if name not in {"OBJECT_NAME", "deleted"}
    }


def whole(resource: type[stripe.StripeObject], /, **given: Any) -> Object:
    """A resource with all its fields: what isn't given is null, where the library says that it may be."""
    fields = fields_of(resource)
    unknown = given.keys() - fields.keys()
    absent = [name for name, optional in fields.items() if not optional and name not in given]
    assert not unknown, f"{resource.__name__} has no {sorted(unknown)}"
    assert not absent, f"{resource.__name__} needs {absent}"
    return dict.fromkeys(fields) | given
