"""The pictures of the documentation, each drawn by a script, of a real run where it shows one: `python -m tests.pictures`."""
