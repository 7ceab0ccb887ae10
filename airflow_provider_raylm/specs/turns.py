"""The turns of a chat as an author writes them: texts and images, by the names of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from airflow_provider_raylm.specs.base import Value
from airflow_provider_raylm.specs.per_row import PerRow


class TextPart(Value):
    """A text beside images."""

    type: Literal["text"]
    text: str = Field(description="Template.")


class ImageAddress(Value):
    """Where an image is, or a column that holds it."""

    url: str = Field(description="Template of an address, or `${column}` that holds an address or the image's bytes.")


class ImagePart(Value):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageAddress


Content = str | tuple[Annotated[TextPart | ImagePart, Field(discriminator="type")], ...]
"""What is said in a turn: a template, or parts."""
Turn = Annotated[dict[str, Content] | str, PerRow(dict[str, Content])]
"""Role and content, or a column that holds turns."""


def templates_of(content: Content) -> Iterator[str]:
    """Yield every template of what is said in a turn."""
    if isinstance(content, str):
        yield content
        return
    for part in content:
        yield part.text if isinstance(part, TextPart) else part.image_url.url
