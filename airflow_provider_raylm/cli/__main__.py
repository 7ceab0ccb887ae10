"""``python -m airflow_provider_raylm.cli``, where the console script is not on the path."""

import sys

from airflow_provider_raylm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
