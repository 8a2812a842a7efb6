"""Do we already know? Exact answers, per tenant."""
