"""``airflow raylm`` and ``raylm``: look at tasks, engines and failed rows from a shell."""
