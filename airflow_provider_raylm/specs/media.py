"""Which images a row may name: an engine's users are not whoever wrote the rows."""

from __future__ import annotations

import os
import re
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import Field, model_validator

from airflow_provider_raylm.specs.base import Value

WEB = frozenset({"http", "https"})
# What urlsplit leaves out of an address, and who opens it does not.
_LEFT_OUT = re.compile(r"^[\x00-\x20]|[\t\r\n]")


class Media(Value):
    """Where the images of rows may lie, and how large they may be.

    An image that a row holds as bytes, or as a ``data:`` address, needs no permission.
    """

    allowed: tuple[str, ...] = Field(
        (), description="Beginnings of addresses that rows may name: https://host/path, s3://bucket/path, /folder."
    )
    max_bytes: int = Field(20_000_000, ge=1, description="Size of an image, at most.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for one in self.allowed:
            parts = urlsplit(one)
            if not (parts.netloc if parts.scheme not in ("", "file") else parts.path.startswith("/")):
                raise ValueError(f"allowed: {one!r} is no beginning of an address; write https://host/ or /folder/")
        return self

    def permits(self, address: str) -> bool:
        """Return whether a row may name *address*."""
        if _LEFT_OUT.search(address):
            return False
        try:
            wanted = _place(address)
        except ValueError:
            return False
        return not _climbs(wanted.path) and any(_is_below(wanted, _place(one)) for one in self.allowed)


def _place(address: str) -> SplitResult:
    parts = urlsplit(address)
    if parts.scheme in WEB:
        return parts._replace(netloc=parts.netloc.lower())
    # To a storage, ? and # are part of a name.
    path = re.sub(r"^[^:/]+:(//)?", "", address) if parts.scheme else address
    if parts.scheme in ("", "file"):
        # Wherever a link leads.
        return parts._replace(scheme="file", netloc="", path=os.path.realpath(path))
    return parts._replace(netloc=parts.netloc.lower(), path=path[len(parts.netloc) :])


def _climbs(path: str) -> bool:
    """Return whether a path leads upwards, to whoever decodes it however often."""
    while (decoded := unquote(path)) != path:
        path = decoded
    return ".." in re.split(r"[/\\]", path)


def _is_below(wanted: SplitResult, allowed: SplitResult) -> bool:
    folder = allowed.path.rstrip("/")
    same = (wanted.scheme, wanted.netloc) == (allowed.scheme, allowed.netloc)
    return same and (wanted.path == folder or wanted.path.startswith(f"{folder}/"))
