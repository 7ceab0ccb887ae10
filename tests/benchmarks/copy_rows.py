"""A Ray job that does what an inference task does around its inference: read the rows, write them."""

import sys

import ray
from ray.data import DataContext


def main(source: str, output: str) -> None:
    DataContext.get_current().enable_progress_bars = False
    ray.data.read_parquet(source).write_parquet(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
