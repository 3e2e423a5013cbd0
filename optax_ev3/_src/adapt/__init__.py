"""Adapt: rules decide which candidate is adopted."""
