"""The Celery face of imattr: tasks of a few lines over `worker`."""
