"""Adapters on the way to a replica: what is none fails the deployment, with its name."""

import json

import pytest

from airflow_provider_raylm.cluster.replica.adapters import engine_kwargs, fetch
from airflow_provider_raylm.errors import EngineError, SpecError
from airflow_provider_raylm.specs import EngineSpec


def adapter(folder, rank=4):
    """Write what tells an adapter's rank."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return folder


def test_adapters_are_fetched(tmp_path):
    """From a URI; one on a path stays where it is."""
    here, there = adapter(tmp_path / "here"), adapter(tmp_path / "there", 12)
    places = fetch({"a": str(here), "b": f"file://{there}"}, str(tmp_path / "copies"))

    assert places["a"] == str(here)
    assert places["b"].startswith(str(tmp_path / "copies"))
    assert engine_kwargs(places) == {"enable_lora": True, "max_lora_rank": 16, "max_loras": 2, "max_cpu_loras": 2}
    assert engine_kwargs({}) == {}


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file:///no/such/folder", "adapters.legal: .*(cannot read|holds no LoRA adapter)"),
        ("/no/such/folder", "adapters.legal: /no/such/folder holds no LoRA adapter"),
        ("{rank}", "adapters.legal: vLLM has no place for an adapter of rank 5000"),
    ],
)
def test_what_is_no_adapter_fails_the_deployment(tmp_path, place, words):
    """With its name, and where it was looked for."""
    huge = adapter(tmp_path / "huge", 5_000)
    with pytest.raises(EngineError, match=words):
        engine_kwargs(fetch({"legal": place.format(rank=huge)}, str(tmp_path / "copies")))


def test_adapters_that_cannot_be():
    """Of an encoder, or with the model's own name."""
    with pytest.raises(SpecError, match="adapters: only for task='generate'"):
        EngineSpec(name="e", model="m", task="embed", adapters={"a": "/a"})
    with pytest.raises(SpecError, match="adapters.m: the model itself has this name"):
        EngineSpec(name="e", model="m", adapters={"m": "/a"})
