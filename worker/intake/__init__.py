"""The ways in: Celery's queue, the stream and files, and the rules they share."""
