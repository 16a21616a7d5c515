"""Ways in: the stream, files, and the rules they share."""
