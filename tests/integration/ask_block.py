"""A Ray job: one call of run_block, with a block as the test wrote it."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from ray import serve

from airflow_provider_raylm.cluster.batch.exchange import Request, packed


def main(deployment: str, application: str, folder: str) -> None:
    block = json.loads((Path(folder) / "block.json").read_text())
    handle = serve.get_deployment_handle(deployment, application)
    parts = handle.options(stream=True).run_block.remote(
        *packed([Request(*request) for request in block["requests"]]),
        question=json.dumps(block["question"]),
        rows=len(block["requests"]),
        task="test",
        timeout=60.0,
    )
    outcomes = {number: asdict(outcome) for part in parts for number, outcome in part.outcomes}
    answers = [outcomes[number] for number in range(len(block["requests"]))]
    (Path(folder) / "outcomes.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
