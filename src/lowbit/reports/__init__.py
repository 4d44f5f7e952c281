"""One self-contained HTML page from finished runs; it takes plain facts, and knows nothing of how runs are made."""
