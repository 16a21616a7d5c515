"""State in Redis: keys, scripts, and what they hold."""
