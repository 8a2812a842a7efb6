"""Run it: local engine or remote server, one interface, streams and whole answers alike."""
