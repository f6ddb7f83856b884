"""Views of a model for notebooks: `explore` computes (torch), every other module draws (numpy)."""
