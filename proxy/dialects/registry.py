"""The dialects by the name that config/upstreams.yaml uses."""

from collections.abc import Mapping
from types import MappingProxyType

from proxy.dialects.dialect import Dialect
from proxy.dialects.openai import OpenAI

__all__ = ["DIALECTS"]

DIALECTS: Mapping[str, Dialect] = MappingProxyType({"openai": OpenAI()})
