"""Arrays about a model: pure functions, figures are drawn elsewhere."""
