"""Limits for tests that parse requests."""

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    body_bytes_max: int = 10 * 1024 * 1024
    messages_max: int = 2_000
    json_depth_max: int = 64
    json_values_max: int = 500_000
    choices_max: int = 8

    def setting(self, limit: str) -> str:
        return f"limit {limit}, set by FAREBOX_{limit.upper()}"
