"""Every night: the day's reviews, labelled and summed up in one pipeline of two steps per row."""

import pendulum
from airflow.sdk import DAG, Param
from airflow.timetables.interval import CronDataIntervalTimetable

from airflow_provider_raylm.authoring import shared_engine

# Qwen3 begins a chat with a thought, which a few tokens would cut off.
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}

with (
    DAG(
        "raylm_daily_reviews",
        # `ds` is then the day that is over; with a cron text it is the day that begins.
        schedule=CronDataIntervalTimetable("@daily", timezone="UTC"),
        start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
        catchup=False,
        max_active_runs=1,
        default_args={"retries": 2, "retry_delay": pendulum.duration(minutes=5)},
        params={"model": Param("Qwen/Qwen3-8B", type="string"), "bucket": Param("s3://reviews", type="string")},
        tags=["raylm"],
    ),
    shared_engine(
        "reviewer",
        model="{{ params.model }}",
        lease={"idle_timeout": 900, "max_lifetime": 6 * 3600},
        # Nobody is there to clear the deploy task when Ray is restarted at night.
        redeploy=True,
    ) as engine,
):
    engine.infer(
        "review",
        source="{{ params.bucket }}/in/{{ ds }}/*.parquet",
        steps=[
            {
                "messages": [{"role": "user", "content": "Positive or negative, one word: ${text}"}],
                "output_column": "label",
                "max_tokens": 4,
                "temperature": 0,
                "extra_body": NO_THINKING,
            },
            {
                "messages": [
                    {"role": "user", "content": "What makes this ${label} review ${label}? One line.\n${text}"}
                ],
                "output_column": "why",
                "max_tokens": 64,
                "temperature": 0,
                "extra_body": NO_THINKING,
            },
        ],
        output="{{ params.bucket }}/out/{{ ds }}",
        max_failed_fraction=0.01,
    )
