"""What did it cost? Prices, one row per admitted request, one per attempt, exact to the nano-dollar."""
