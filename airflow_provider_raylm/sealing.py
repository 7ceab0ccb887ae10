"""How rows come from a job to the one who asked, through a log that others may read: as bytes that say nothing to them.

A one-time pad: random bytes that are handed to the job as credentials are, and used for one text. Who lacks them learns
how long the text is, and nothing else.
"""

from __future__ import annotations

import base64
import secrets

PAD = "raylm-pad"
"""Its name among what is handed to a job; no protocol of a file system is called so."""
PAD_BYTES = 128 << 10
"""How long a sealed text may be, in UTF-8."""


def new_pad() -> bytes:
    """Return a pad. It may be used once."""
    return secrets.token_bytes(PAD_BYTES)


def seal(text: str, pad: bytes) -> str:
    """Return *text* as ASCII that only who has the pad can read.

    Raises:
        ValueError: the text is longer than the pad.
    """
    content = text.encode()
    if len(content) > len(pad):
        raise ValueError(f"{len(content):,} bytes, and a pad of {len(pad):,}")
    return base64.b64encode(_xor(content, pad)).decode()


def unseal(sealed: str, pad: bytes) -> str:
    """Return the text that was sealed with the pad."""
    return _xor(base64.b64decode(sealed), pad).decode()


def _xor(content: bytes, pad: bytes) -> bytes:
    used = pad[: len(content)]
    return (int.from_bytes(content) ^ int.from_bytes(used)).to_bytes(len(content))
