"""Everything on one machine: an API simulator, a Redis server, worker processes."""
