"""What would go wrong in a run, found from its models and data before the first step."""
