"""Parse and answer: the wire formats, and nothing else, live here."""
