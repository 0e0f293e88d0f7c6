"""A rank's graph: expansions, collectives where placements disagree, local shapes."""
