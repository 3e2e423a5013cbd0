"""Explore: explorers propose parameters."""
