"""Alerts and dashboard: made and checked from the catalogue of metrics, and played for real. `make alerts` runs the last."""
