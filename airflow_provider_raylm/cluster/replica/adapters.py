"""LoRA adapters of an engine: brought to the replica before it starts, because vLLM has to know their largest rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import fsspec

from airflow_provider_raylm.errors import EngineError

# Adapters that the engine works with at a time; more take turns.
AT_A_TIME = 8


def fetch(adapters: Mapping[str, str], folder: str) -> dict[str, str]:
    """Return where each adapter lies on this node.

    One on a path of the node stays there; one at a URI is copied below *folder*, where vLLM reads it; a Hugging Face id
    is vLLM's own affair.

    Raises:
        EngineError: there is none.
    """
    places = {}
    for number, (name, place) in enumerate(adapters.items()):
        places[name] = _fetched(name, place, str(Path(folder, str(number)))) if "://" in place else place
    return places


def _fetched(name: str, place: str, folder: str) -> str:
    try:
        files, path = fsspec.core.url_to_fs(place)
        files.get(path.rstrip("/") + "/", folder, recursive=True)
    except Exception as error:  # each file system has its own
        raise EngineError(f"adapters.{name}: cannot read {place}: {type(error).__name__}: {error}") from None
    return folder


def engine_kwargs(places: Mapping[str, str]) -> dict[str, Any]:
    """Return vLLM's arguments for adapters at these places.

    Raises:
        EngineError: a place holds none, or one of a rank that vLLM does not know.
    """
    if not places:
        return {}
    from vllm.config.lora import MaxLoRARanks

    ranks = {name: _rank(name, place) for name, place in places.items()}
    largest = max(ranks, key=ranks.__getitem__)
    fitting = [rank for rank in sorted(get_args(MaxLoRARanks)) if rank >= ranks[largest]]
    if not fitting:
        raise EngineError(f"adapters.{largest}: vLLM has no place for an adapter of rank {ranks[largest]}.")
    return {
        "enable_lora": True,
        "max_lora_rank": fitting[0],
        "max_loras": min(len(places), AT_A_TIME),
        "max_cpu_loras": len(places),
    }


def _rank(name: str, place: str) -> int:
    config = Path(place) / "adapter_config.json"
    try:
        if not place.startswith("/"):
            from huggingface_hub import hf_hub_download

            config = Path(hf_hub_download(place, config.name))
        return int(json.loads(config.read_text())["r"])
    except Exception as error:  # no file, no repository, no JSON, no rank
        raise EngineError(
            f"adapters.{name}: {place} holds no LoRA adapter (adapter_config.json with its rank, r): {error}"
        ) from None


async def load(models: Any, places: Mapping[str, str]) -> None:
    """Have the engine load the adapters, so that one that it cannot take fails the deployment.

    Args:
        models: vLLM's ``OpenAIServingModels``, which knows adapters by their names.
        places: where each lies.

    Raises:
        EngineError: the engine refuses one.
    """
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

    for name, place in places.items():
        answer = await models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=place))
        if hasattr(answer, "error"):
            raise EngineError(f"adapters.{name}: {answer.error.message}")
