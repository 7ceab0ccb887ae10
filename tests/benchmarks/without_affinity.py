"""What runs a cluster's jobs instead of Python, so that rows go to any replica, whatever they begin with.

``python -m tests.benchmarks.without_affinity -m airflow_provider_raylm.cluster infer`` is the package's own job but for
that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pyarrow as pa

from airflow_provider_raylm.cluster.batch import pipeline


class AnywhereAndWrite(pipeline.AnswerAndWrite):
    """The stage's actor."""

    def __call__(self, begin: pa.Table) -> Iterator[pa.Table]:
        """Do as the package's own, without a look at what rows begin with."""
        pipeline.by_prefix = lambda ask, replicas, cache_tokens: ask
        yield from super().__call__(begin)


if __name__ == "__main__":
    from airflow_provider_raylm.cluster.__main__ import main
    from tests.benchmarks.without_affinity import AnywhereAndWrite as Imported

    # By the name under which the actor's process finds it.
    pipeline.AnswerAndWrite = Imported  # type: ignore[misc]
    # Behind "-m airflow_provider_raylm.cluster".
    sys.exit(main(sys.argv[3:]))
