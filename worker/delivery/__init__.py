"""Ways out: batches, permits, calls of the API and what follows from the answers."""
