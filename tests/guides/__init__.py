"""The projects of `docs/guides/`, taken from the pages and run as they stand there."""
