"""The cost dashboard: server-rendered, no build step, no outside request."""
