"""What the API has, read back and compared with what it should have."""
