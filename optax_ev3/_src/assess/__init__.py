"""Assess: scores of all candidates."""
