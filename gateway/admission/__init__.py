"""May it run? Keys, rates and budgets."""
