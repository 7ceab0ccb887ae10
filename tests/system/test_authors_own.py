"""What an author has beside the DAG and in Airflow's connections reaches the cluster; an engine within an engine."""

import io
import json
from urllib.parse import quote

import pyarrow.parquet as pq
import s3fs

from tests.s3 import PRIVATE_BUCKET, PRIVATE_KEY, PRIVATE_SECRET

DAG_ID = "system_authors_own"
ROWS = 40
RUN_TIMEOUT_S = 500


def test_a_run_with_the_authors_code_and_connections(scene, s3):
    """The function is in no image, the storage opens to nobody else, one engine lives within the other's time."""
    fs = s3fs.S3FileSystem(key=PRIVATE_KEY, secret=PRIVATE_SECRET, endpoint_url=s3.url)
    fs.makedirs(PRIVATE_BUCKET, exist_ok=True)
    fs.pipe_file(f"{PRIVATE_BUCKET}/system/in.txt", "".join(f"row {i}\n" for i in range(ROWS)).encode())
    airflow = scene.airflow
    extra = json.dumps({"endpoint_url": s3.url})
    airflow.connect("private_store", conn_type="aws", login=PRIVATE_KEY, password=PRIVATE_SECRET, extra=extra)
    root = f"s3://{PRIVATE_BUCKET}/system"
    conf = {"model": scene.spec("any")["model"], "source": f"{root}/in.txt", "output": f"{root}/out"}
    run = airflow.trigger(DAG_ID, conf)
    state = airflow.wait(DAG_ID, run, RUN_TIMEOUT_S)
    states = airflow.states(DAG_ID, run)
    logs = {task: airflow.log(DAG_ID, run, task) for task in states}

    assert (state, set(states.values())) == ("success", {"success"}), {task: log[-2000:] for task, log in logs.items()}
    found = [
        pq.read_table(io.BytesIO(fs.cat_file(name))) for name in fs.find(f"{root}/out/second/") if "/part-" in name
    ]
    rows = [row for table in found for row in table.to_pylist()]
    assert {(row["text"], row["seen"], row["second"]) for row in rows} == {
        (f"row {i}", DAG_ID, "so") for i in range(ROWS)
    }
    times = {ti["task_id"]: (ti["start_date"], ti["end_date"]) for ti in airflow.instances(DAG_ID, run)}
    assert times["teardown_outer"][0] > max(times["teardown_inner"][1], times["second"][1])
    assert not scene.engines()
    path = f"/dags/{DAG_ID}/dagRuns/{quote(run)}/taskInstances"
    shown = [json.dumps(airflow.call("GET", f"{path}/{task}")) for task in states]
    shown += [json.dumps(airflow.xcom(DAG_ID, run, task)) for task in states]
    assert not [one for one in [*shown, *logs.values()] if PRIVATE_SECRET in one]
