"""How much a model withstands, and whether the attacks that say so can be believed."""
