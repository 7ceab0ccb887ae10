"""One shared vLLM engine on Ray Serve per Airflow DAG run.

The Ray cluster imports this package too, so this module imports neither Airflow nor Ray.
"""

__version__ = "0.1.0"
