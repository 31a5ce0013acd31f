"""`stableopd eval`: how good a model's answers are, problem by problem, and how sure that is."""
