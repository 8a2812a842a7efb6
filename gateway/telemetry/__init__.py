"""What the operator sees: metrics and logs. Never a prompt, never a key."""
