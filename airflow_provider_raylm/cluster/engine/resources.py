"""What an engine asks of a cluster, what the cluster has, and how to say both. Pure."""

from __future__ import annotations

from airflow_provider_raylm.specs import EngineSpec

Bundle = dict[str, float]

# Ray counts resources in ten-thousandths; a sum of such in floats may be a little more, and a quotient a little less.
_DIGITS = 4
_ROUNDING = 1e-9


def bundles(spec: EngineSpec) -> list[Bundle]:
    """Return what one replica asks of the cluster.

    One bundle per vLLM worker, the first of which also holds the replica; without a GPU the workers are processes
    of the replica itself.
    """
    if not spec.gpus_per_worker:
        return [{"CPU": spec.num_cpus}]
    worker: Bundle = {"GPU": spec.gpus_per_worker}
    if spec.accelerator_type:
        worker[f"accelerator_type:{spec.accelerator_type}"] = 0.001
    workers = [dict(worker) for _ in range(spec.workers)]
    workers[0]["CPU"] = spec.num_cpus
    return workers


def shortage(spec: EngineSpec, nodes: list[Bundle]) -> str | None:
    """Return what the cluster lacks in total for *spec*, or None when it could fit once everything is free.

    Args:
        spec: the engine.
        nodes: total resources of every live node.
    """
    replicas = spec.replicas[0] if isinstance(spec.replicas, tuple) else spec.replicas
    asked = bundles(spec) * replicas
    there = total(nodes)
    lacking = {name: amount for name, amount in total(asked).items() if there.get(name, 0.0) < amount}
    homeless = [
        bundle
        for bundle in bundles(spec)
        if not any(all(node.get(name, 0.0) >= amount for name, amount in bundle.items()) for node in nodes)
    ]
    # Ray never puts a fraction together from two GPUs, so that 0.6 leaves 0.4 that nobody like it can use.
    shared = 0 < spec.gpus_per_worker < 1
    on_one = int(1 / spec.gpus_per_worker + _ROUNDING) if shared else 1
    crowded = shared and int(there.get("GPU", 0.0)) * on_one < len(asked)
    if not lacking and not homeless and not crowded:
        return None
    return (
        f"The engine asks for {show(total(asked))}"
        + (f" in {len(asked)} parts of {show(asked[0])}" if len(asked) > 1 else "")
        + (f", {on_one} of which fit{'s' * (on_one == 1)} on a GPU" if crowded else "")
        + f"; the cluster has {show(there)} in total"
        + (f", its nodes {'; '.join(show(node) for node in nodes)}" if len(nodes) > 1 else "")
        + ". Ask for less (gpus_per_worker, num_cpus, accelerator_type, tensor_parallel_size, replicas), or add nodes; "
        "on a cluster that grows by itself, raise scale_up_timeout."
    )


def total(parts: list[Bundle]) -> Bundle:
    """Add resources up, by name."""
    summed: Bundle = {}
    for part in parts:
        for name, amount in part.items():
            summed[name] = round(summed.get(name, 0.0) + amount, _DIGITS)
    return summed


def show(resources: Bundle) -> str:
    """Print the resources a reader asked for: CPUs, GPUs, accelerators; not Ray's bookkeeping."""
    shown = []
    for name in sorted(resources):
        if name in ("CPU", "GPU"):
            shown.append(f"{resources[name]:g} {name}")
        elif name.startswith("accelerator_type:"):
            shown.append(name.removeprefix("accelerator_type:"))
    if "GPU" not in resources:
        shown.append("0 GPU")
    return ", ".join(shown)
