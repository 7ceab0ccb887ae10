"""Files on whatever storage fsspec opens: listed afresh, read in parts, written whole or not at all.

fsspec's file systems remember listings for the life of the process, and what another process wrote is then not there.
So nothing here answers from an earlier listing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
from fsspec.config import conf
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from airflow_provider_raylm.errors import BatchError

REQUESTS_AT_A_TIME = 32
# s3fs would read 50 MiB ahead, for a column of a row group, too.
_READ_AHEAD_BYTES = 1 << 23

# Here a name is no more than a key: there are no folders to make, and an upload shows when it is complete. To make the
# "folder" of a bucket's first key would be to make the bucket, which a policy for a prefix forbids.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "tos", "hf"})
# What tells two contents of a name apart, the surest first, by the names that fsspec's file systems have for it.
_VERSIONS = (
    *("ETag", "etag", "e_tag", "md5Hash", "content_md5", "content_settings", "generation", "VersionId"),
    *("mtime", "LastModified", "last_modified", "modified", "updated", "created"),
)

Info = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A file, folder or glob, by any address that fsspec opens.

    Attributes:
        uri: as the author wrote it.
    """

    uri: str

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            fs, path = url_to_fs(self.uri, **_options(self.uri))
        # TypeError: "::" in an address chains two file systems, of which one may not take the other's options.
        except (ImportError, ValueError, TypeError) as error:
            raise BatchError(f"cannot open {self.uri!r}: {error}") from error
        if not _is(fs, {"file"}):
            return fs, path.rstrip("/")
        if os.path.islink(path) and not os.path.isdir(path):
            # Its own name tells the format; what it leads to may be called anything.
            folder, name = os.path.split(path)
            return fs, f"{os.path.realpath(folder)}/{name}"
        return fs, os.path.realpath(path)

    @property
    def fs(self) -> Any:
        """The file system."""
        return self._opened[0]

    @property
    def path(self) -> str:
        """The path on it, without a slash at its end."""
        return self._opened[1]

    @property
    def local(self) -> bool:
        """Whether it is in a folder of this machine, a mounted one included."""
        return _is(self.fs, {"file"})

    @property
    def in_object_store(self) -> bool:
        """Whether names are keys here, without folders."""
        return _is(self.fs, _OBJECT_STORES)

    @property
    def name(self) -> str:
        """The one address of the place, however it was written."""
        return str(self.fs.unstrip_protocol(self.path))

    def files(self) -> dict[str, Info]:
        """Return what lies at or below the place: name to what the storage tells of it, in one listing.

        Raises:
            BatchError: the storage refused; the text names the place.
        """
        return self._listed("find")

    def matching(self) -> dict[str, Info]:
        """Return the files that the place names as a glob, as ``files`` does; of a partition's folder all."""
        return self._listed("glob")

    def _listed(self, how: str) -> dict[str, Info]:
        try:
            self.fs.invalidate_cache()
            found = self._followed(getattr(self.fs, how)(self.path, detail=True), {self.path})
        # Without credentials, or a way there, the libraries of object stores raise errors of their own.
        except Exception as error:
            if isinstance(error, BatchError):
                raise
            raise BatchError(
                f"cannot list {self.uri}: {error}. Check the address, and the credentials that the cluster's nodes or "
                "the task (storage_conn_id) have for it."
            ) from error
        return {path: info for path, info in sorted(found.items()) if info.get("type", "file") == "file"}

    def _followed(self, found: dict[str, Info], seen: set[str]) -> dict[str, Info]:
        """Return a listing with what links lead to: files as such, and those of folders, except of *seen* ones."""
        files: dict[str, Info] = {}
        for path, info in found.items():
            if info.get("type") == "directory" and is_partition(path):
                files |= self._followed(self.fs.find(path, detail=True), seen)
            # Of local files alone.
            elif not info.get("islink"):
                files[path] = info
            elif (target := self.fs.info(path))["type"] != "directory":
                files[path] = target
            elif (folder := os.path.realpath(path)) not in seen:
                files |= self._followed(self.fs.find(path, detail=True), {*seen, folder})
        return files

    def below(self, name: str) -> Place:
        """Return the place of a file in this folder."""
        return Place(f"{self.uri.rstrip('/')}/{name}")

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """Return the file's content, or its bytes from *start* to *end*.

        Raises:
            FileNotFoundError: there is none.
        """
        return bytes(self.fs.cat_file(self.path, start=start, end=end))

    def open(self) -> Any:
        """Return the file as a stream of bytes to read, of which some are read ahead."""
        return self.fs.open(self.path, "rb", block_size=_READ_AHEAD_BYTES)

    def write(self, content: bytes) -> None:
        """Write the file so that a reader sees all of it or nothing.

        Raises:
            BatchError: the storage refused; the text names the place.
        """
        try:
            if self.in_object_store:
                self.fs.pipe_file(self.path, content)
                return
            folder, _, name = self.path.rpartition("/")
            self.fs.makedirs(folder, exist_ok=True)
            # Renamed into place.
            self.fs.pipe_file(f"{folder}/.{name}.tmp", content)
            self.fs.mv(f"{folder}/.{name}.tmp", self.path)
        except OSError as error:
            raise BatchError(f"cannot write {self.uri}: {error}") from error

    def delete(self) -> None:
        """Delete the file; one that is gone already is no error.

        Raises:
            BatchError: the storage refused; the text names the place.
        """
        try:
            self.fs.rm_file(self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise BatchError(f"cannot delete {self.uri}: {error}") from error


def is_partition(path: str) -> bool:
    """Return whether a path is a folder's that tells a column of its rows, ``day=2026-01-01``."""
    return "=" in path.rpartition("/")[2]


def _options(uri: str) -> dict[str, Any]:
    """Return options of a file system beside those that the cluster configures for fsspec."""
    protocol = get_protocol(uri)
    if protocol not in ("s3", "s3a"):
        return {}
    configured = dict(conf.get(protocol, {}).get("config_kwargs", {}))
    # botocore's own bound is 10 connections: more requests at a time than that wait for each other.
    return {"config_kwargs": {"max_pool_connections": REQUESTS_AT_A_TIME, **configured}}


def _is(fs: Any, protocols: frozenset[str] | set[str]) -> bool:
    own = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return not protocols.isdisjoint(own)


def version(info: Info) -> str:
    """Return what changes when a file's content does, and not when only its mode, owner or links do."""
    told = next((info[name] for name in _VERSIONS if info.get(name) is not None), None)
    return f"{info.get('size')}:{told}"


@contextmanager
def reading(uri: str, what: str) -> Iterator[None]:
    """Name the file in whatever goes wrong while it is read.

    Raises:
        BatchError: the storage, the format, JSON, CSV or the encoding.
    """
    try:
        yield
    # EOFError: a compressed file that was cut off.
    except (OSError, pa.ArrowException, ValueError, EOFError) as error:
        if isinstance(error, BatchError):
            raise
        raise BatchError(f"cannot read {uri} as {what}: {error}") from error
