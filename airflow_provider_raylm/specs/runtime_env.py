"""What a job and its engine find on the cluster beside the image: variables, the author's modules, packages."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

from pydantic import Field, JsonValue, model_validator

from airflow_provider_raylm.specs.base import Value

Requirements = tuple[str, ...] | dict[str, JsonValue]


class RuntimeEnv(Value):
    """Ray's runtime_env, as far as it travels with a job: by Ray's own names, and ``secret_env``.

    The engine and its tasks get the same: an engine's is in its reference.
    """

    env_vars: dict[str, str] = Field(default_factory=dict, description="Environment; the dashboard shows it.")
    secret_env: dict[str, str] = Field(
        default_factory=dict, description="Secret environment: each variable's file on the cluster's nodes."
    )
    py_modules: tuple[str, ...] = Field(
        (), description="Folders of packages, or modules, from the DAG's folder on; or addresses of zips."
    )
    working_dir: str | None = Field(
        None, min_length=1, description="Folder that jobs begin in, from the DAG's folder on; or address of a zip."
    )
    pip: Requirements = Field((), description="Packages to install, or Ray's dict about them.")
    uv: Requirements = Field((), description="As pip, installed by uv.")

    # What an engine that runs already is not replaced for: the author's functions, which its tasks bring themselves.
    not_identity: ClassVar[frozenset[str]] = frozenset({"py_modules", "working_dir"})
    _elsewhere: ClassVar[dict[str, str]] = {
        "conda": "set pip or uv, or build it into the cluster's image",
        "container": "the cluster has one image; set it where the cluster is defined",
        "image_uri": "the cluster has one image; set it where the cluster is defined",
        "excludes": "name a folder that only has what shall travel",
        "config": "set it on the cluster's nodes",
        "worker_process_setup_hook": "a row function's module can do it when it is imported",
    }
    _own_variables: ClassVar[dict[str, str]] = {
        "RAYLM_*": "this package's own",
        "RAY_NAMESPACE": "set the connection's namespace instead",
        "RAY_ADDRESS": "a job belongs to the cluster that runs it",
    }

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        for name in given if isinstance(given, Mapping) else ():
            if name not in cls.model_fields:
                way_out = cls._elsewhere.get(name, f"known are {', '.join(cls.model_fields)}")
                raise ValueError(f"{name}: not taken over; {way_out}")
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pip and self.uv:
            raise ValueError("uv: pip is given, too; one of them installs")
        twice = sorted(set(self.env_vars) & set(self.secret_env))
        if twice:
            raise ValueError(f"secret_env.{twice[0]}: env_vars sets it, too")
        for field in ("env_vars", "secret_env"):
            for name in getattr(self, field):
                for pattern, instead in self._own_variables.items():
                    if fnmatchcase(name, pattern):
                        raise ValueError(f"{field}.{name}: {instead}")
        return self

    def over(self, other: RuntimeEnv) -> RuntimeEnv:
        """Return this with what only the other one says; of variables, each by itself."""
        mine, theirs = self.model_dump(exclude_defaults=True), other.model_dump(exclude_defaults=True)
        if self.pip or self.uv:
            theirs = {name: value for name, value in theirs.items() if name not in ("pip", "uv")}
        given = {"env_vars": self.env_vars, "secret_env": self.secret_env}
        both = {name: {**theirs.pop(name, {}), **mine.pop(name, {})} for name in given}
        # Here a secret there hides a plain value, and the other way round.
        for name, rival in (("env_vars", "secret_env"), ("secret_env", "env_vars")):
            both[name] = {key: value for key, value in both[name].items() if key not in given[rival]}
        return RuntimeEnv(**{**theirs, **mine, **both})
