"""What travels to the cluster as a zip: this package, and folders of a DAG's author. Equal content travels once."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.specs import RuntimeEnv

# Ray keeps packages in the memory of its head node.
_MAX_BYTES = 100 << 20


@dataclass(frozen=True)
class Archive:
    """A zip as Ray's ``py_modules`` and ``working_dir`` accept it.

    Attributes:
        name: with a hash of the files, so that another content never meets the cached one.
        content: its bytes.
    """

    name: str
    content: bytes = field(repr=False)

    @property
    def uri(self) -> str:
        """What a job's runtime_env calls it."""
        return f"gcs://{self.name}"


@dataclass(frozen=True)
class Packed:
    """A RuntimeEnv whose folders have been packed; what was an address before is one still.

    Attributes:
        spec: what it was made of.
        py_modules: by the order of the spec.
        working_dir: None when there is none.
    """

    spec: RuntimeEnv = field(default_factory=RuntimeEnv)
    py_modules: tuple[Archive | str, ...] = ()
    working_dir: Archive | str | None = None

    @property
    def archives(self) -> tuple[Archive, ...]:
        """What has to be on the cluster before a job begins."""
        return tuple(one for one in (*self.py_modules, self.working_dir) if isinstance(one, Archive))

    def for_ray(self) -> dict[str, Any]:
        """Return it as Ray's runtime_env, without what the spec leaves out."""
        found: dict[str, Any] = self.spec.model_dump(mode="json", include={"env_vars", "pip", "uv"})
        found["py_modules"] = [_address(one) for one in self.py_modules]
        found["working_dir"] = self.working_dir and _address(self.working_dir)
        return {name: value for name, value in found.items() if value}

    @property
    def identity(self) -> dict[str, Any]:
        """What a job that runs with another one lacks; empty when nothing is asked for."""
        files = {"secret_env": dict(self.spec.secret_env)} if self.spec.secret_env else {}
        return {**self.for_ray(), **files}


def pack(spec: RuntimeEnv, base: Path) -> Packed:
    """Pack the folders of a runtime_env.

    Args:
        spec: what to pack.
        base: the folder to which relative paths belong: the DAG's.

    Raises:
        SpecError: there is no such file or folder, or it is too large; the text names the field.
    """
    modules = tuple(
        path if _is_address(path) else _archive("py_modules", base / path, inside=True) for path in spec.py_modules
    )
    folder = spec.working_dir
    if folder is None or _is_address(folder):
        return Packed(spec, modules, folder)
    return Packed(spec, modules, _archive("working_dir", base / folder, inside=False))


@cache
def package_archive() -> Archive:
    """Return this package."""
    root = Path(__file__).parent
    return _zip((f"{root.name}/{path.relative_to(root).as_posix()}", path) for path in sorted(root.rglob("*.py")))


def _address(one: Archive | str) -> str:
    return one.uri if isinstance(one, Archive) else one


def _is_address(path: str) -> bool:
    return "://" in path


def _archive(name: str, path: Path, inside: bool) -> Archive:
    """Pack a folder, or one module; *inside* the folder of its own name, as who imports it needs it."""
    if path.is_dir():
        files: Iterable[Path] = _files(path)
        root = path.parent if inside else path
    elif inside and path.suffix == ".py" and path.is_file():
        files, root = [path], path.parent
    else:
        raise SpecError(
            f"runtime_env.{name}: there is no folder{' or module' if inside else ''} {path} on this worker. A relative "
            "path begins at the DAG's file."
        )
    found = [(file.relative_to(root).as_posix(), file) for file in files]
    size = sum(file.stat().st_size for _, file in found)
    if size > _MAX_BYTES:
        raise SpecError(
            f"runtime_env.{name}: {path} has {size >> 20} MiB; {_MAX_BYTES >> 20} can travel with a job. Leave data "
            "out of it, or build it into the cluster's image."
        )
    return _zip(found)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).parts
        if path.is_file() and "__pycache__" not in inner and not any(part.startswith(".") for part in inner):
            yield path


def _zip(files: Iterable[tuple[str, Path]]) -> Archive:
    buffer = io.BytesIO()
    digest = hashlib.sha256()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files:
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            # The same bytes whoever packs it, and when.
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), content)
    return Archive(f"_ray_pkg_{digest.hexdigest()[:32]}.zip", buffer.getvalue())
