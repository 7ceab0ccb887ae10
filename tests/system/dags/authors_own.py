"""A DAG with a package beside it, a storage that a connection opens, and an engine within an engine."""

from airflow.sdk import DAG

from airflow_provider_raylm.authoring import shared_engine

ENGINE = {"model": "{{ params.model }}", "gpus_per_worker": 0, "num_cpus": 0.3, "hang_timeout": 60}
OURS = {"py_modules": ["authors_rows"], "env_vars": {"AUTHORS_OWN": "{{ dag.dag_id }}"}}
ASK = {"max_tokens": 1, "block_rows": 16}

with DAG(
    "system_authors_own",
    schedule=None,
    params={"model": "", "source": "", "output": ""},
    default_args={"raylm_conn_id": "raylm_chaos", "deferrable": True, "poll_interval": 1},
):
    with shared_engine("outer", runtime_env=OURS, storage_conn_id="private_store", **ENGINE) as outer:
        with shared_engine("inner", storage_conn_id="private_store", **ENGINE) as inner:
            first = inner.infer(
                "first", source="{{ params.source }}", prompt="${text}", output="{{ params.output }}/first", **ASK
            )
        outer.infer(
            "second",
            source=first.output,
            prompt="${text} ${first}",
            preprocess="authors_rows.rows:clean",
            output="{{ params.output }}/second",
            **ASK,
        )
