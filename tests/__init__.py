"""Tests; `python -m tests.bench` measures."""
