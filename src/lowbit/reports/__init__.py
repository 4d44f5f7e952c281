"""Self-contained HTML reports on finished runs, rendered from plain data."""
