"""Images of rows, which reach the engine as ``data:`` addresses: it never fetches what a row names.

Who wrote the rows does not choose what the engine's network and credentials reach: an address is looked up here, and
only below what the engine's spec allows.
"""

from __future__ import annotations

import base64
import errno
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from airflow_provider_raylm.cluster.batch.exchange import RowError
from airflow_provider_raylm.cluster.batch.storage import Place
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import Media
from airflow_provider_raylm.specs.media import WEB

# Images of a block that are fetched at a time.
AT_A_TIME = 16
TIMEOUT_S = 30.0
# A server may send a byte now and then for ever, and each within the time that is allowed for one.
DOWNLOAD_S = 120.0
# A server that is busy is asked again after so many seconds.
PAUSES_S = (1.0, 4.0)
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_INLINE = "data:"
# What a name alone can bring about, whatever the storage: it is too long, or goes round in a circle of links.
_BAD_NAMES = frozenset({errno.ENAMETOOLONG, errno.ELOOP})


def image_address(value: Any, media: Media) -> str:
    """Return an image as a ``data:`` address.

    Args:
        value: its bytes, or a mapping that has them as ``bytes`` or else a ``path`` (as Hugging Face's datasets have
            images), or an address.
        media: what a row may name.

    Raises:
        RowError: ``invalid_image``: it is none of these, too large, not allowed, or not there.
        BatchError: the storage refused, which is no row's fault.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return _inline(value, media)
    if not isinstance(value, str) or not value:
        raise _bad(f"neither bytes nor an address, but {type(value).__name__}")
    if value.startswith(_INLINE):
        # Four characters for three bytes.
        _require_size(len(value) * 3 // 4, media)
        return value
    if not media.permits(value):
        raise _bad(f"{value!r} is not below what the engine's spec allows (media.allowed)")
    scheme = urlsplit(value).scheme
    # fsspec knows the names of its file systems in small letters only.
    address = scheme + value[len(scheme) :]
    return _inline(_downloaded(address, media) if scheme in WEB else _read(address, media), media)


def _inline(content: bytes, media: Media) -> str:
    _require_size(len(content), media)
    # vLLM looks at the content for the kind of image.
    return f"{_INLINE}application/octet-stream;base64,{base64.b64encode(content).decode()}"


def _require_size(size: int, media: Media) -> None:
    if size > media.max_bytes:
        raise _bad(f"it has more than {media.max_bytes:,} bytes (media.max_bytes)")


def _read(address: str, media: Media) -> bytes:
    try:
        place = Place(address)
        if "/" not in place.path:
            raise _bad(f"{address} is a bucket, and no file")
        with place.open() as file:
            return bytes(file.read(media.max_bytes + 1))
    except (FileNotFoundError, NotADirectoryError):
        raise _bad(f"there is no {address}") from None
    except IsADirectoryError:
        raise _bad(f"{address} is a folder, and no file") from None
    except (BatchError, RowError):
        raise
    # Object stores raise errors of their own.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _BAD_NAMES:
            raise _bad(f"{address}: {error.strerror}") from None
        raise BatchError(
            f"cannot read the image {address}: {error}. Check the credentials that the cluster's nodes or the task "
            "(storage_conn_id) have for it."
        ) from error


def _downloaded(address: str, media: Media) -> bytes:
    import httpx

    for pause in (*PAUSES_S, None):
        try:
            # A redirect leads to where nobody has allowed.
            with httpx.stream("GET", address, timeout=TIMEOUT_S, follow_redirects=False) as response:
                if response.is_success:
                    return _body(response.iter_bytes(), media)
                problem = f"the server answered {response.status_code}"
                busy = response.status_code in _BUSY
        except httpx.HTTPError as error:
            problem, busy = f"{type(error).__name__}: {error}", True
        except httpx.InvalidURL as error:
            problem, busy = str(error), False
        if not busy or pause is None:
            break
        time.sleep(pause)
    raise _bad(f"{address}: {problem}")


def _body(parts: Any, media: Media) -> bytes:
    content = bytearray()
    end = time.monotonic() + DOWNLOAD_S
    for part in parts:
        content += part
        _require_size(len(content), media)
        if time.monotonic() > end:
            raise _bad(f"it did not come within {DOWNLOAD_S:g} s")
    return bytes(content)


def _bad(why: str) -> RowError:
    return RowError("invalid_image", why)
