"""Faults on real parts, at random moments: what became of the rows, and what was left behind.

Writes build/chaos/chaos.json and prints a table; fails when a row was lost or doubled, or anything was left.
"""

import argparse
import json
import random
import statistics
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from tests.chaos import airflow_faults, cluster_faults  # noqa: F401 - they register their faults
from tests.chaos.faults import FAULTS
from tests.chaos.scene import Accounts, Scene
from tests.clusters import ray_cluster
from tests.s3 import reached, s3_server

REPOSITORY = Path(__file__).parents[2]
OUT = REPOSITORY / "build" / "chaos"
REPEATS = 3

NOTHING = ("rows_lost", "rows_duplicated", "engines_left", "processes_left")


def run(wanted, repeats, seed):
    """Yield (fault, the accounts of its repeats) as they come; the accounts of one that went wrong are None."""
    # First the storage: the cluster's processes find it by their environment.
    with s3_server() as s3, reached(s3), ray_cluster() as cluster, ExitStack() as stack:
        scene = Scene(cluster, random.Random(seed), stack, s3=s3)
        scene.engine = scene.deploy("shared")
        for name in wanted:
            every = []
            for _ in range(repeats):
                started = time.monotonic()
                try:
                    accounts = FAULTS[name](scene)
                    accounts.engines_left = len(scene.engines())
                    accounts.processes_left = scene.strays_after_a_while()
                    every.append(accounts)
                except (Exception, pytest.fail.Exception):
                    # The next fault says more than no table at all.
                    traceback.print_exc()
                    every = None
                    break
                print(f"chaos: {name} {asdict(accounts)}, took {time.monotonic() - started:.0f} s", flush=True)
            yield name, every


def case(name, every):
    """Return the sums of a fault's repeats; recovery is their median."""
    sums = {field.name: sum(getattr(one, field.name) for one in every) for field in fields(Accounts)}
    recovery = statistics.median(one.recovery_s for one in every)
    return {"fault": name, "repeats": len(every), **sums, "recovery_s": round(recovery, 1)}


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="each fault once")
    parser.add_argument("--only", nargs="+", choices=FAULTS, help="of others, chaos.json keeps what it has")
    parser.add_argument("--repeats", type=int, help=f"default: {REPEATS}, with --quick 1")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    repeats = arguments.repeats or (1 if arguments.quick else REPEATS)
    print(f"chaos: seed {arguments.seed}", flush=True)
    written = OUT / "chaos.json"
    kept = json.loads(written.read_text())["cases"] if arguments.only and written.exists() else []
    cases, broken = [one for one in kept if one["fault"] not in arguments.only], []
    for name, every in run(arguments.only or FAULTS, repeats, arguments.seed):
        if every is None or any(getattr(one, count) for one in every for count in NOTHING):
            broken.append(name)
        if every:
            cases.append(case(name, every))
            written.write_text(json.dumps({"cases": cases}, indent=1))
    columns = ["repeats", *(field.name for field in fields(Accounts))]
    print(f"\n{'fault':<24}" + "".join(f"{column.removeprefix('rows_'):>16}" for column in columns))
    for one in cases:
        print(f"{one['fault']:<24}" + "".join(f"{one[column]:>16}" for column in columns))
    print(f"\nchaos: {'BROKEN: ' + ', '.join(broken) if broken else 'OK'}; {written}")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
