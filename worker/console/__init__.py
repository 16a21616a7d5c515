"""The console: a website for operators."""
