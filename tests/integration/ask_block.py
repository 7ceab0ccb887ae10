"""A Ray job: one call of run_block, with a block as the test wrote it."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from ray import serve


def main(deployment: str, application: str, folder: str) -> None:
    block = json.loads((Path(folder) / "block.json").read_text())
    handle = serve.get_deployment_handle(deployment, application)
    outcomes = handle.run_block.remote(json.dumps(block["fields"]), block["contents"], 60.0).result(timeout_s=120)
    (Path(folder) / "outcomes.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes]))


if __name__ == "__main__":
    main(*sys.argv[1:])
