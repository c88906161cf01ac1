"""Classifier terms in a worker: texts of candidates, their classes' probabilities, rows for the formula."""
