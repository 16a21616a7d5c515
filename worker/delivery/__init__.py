"""The way out: batches, permits, API calls, and what follows from the answers."""
