"""The part that runs on the Ray cluster. It never imports airflow."""
