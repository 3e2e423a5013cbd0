"""Ground floor: types, trees of arrays, checks. It knows nothing of the stages."""
