"""The tables of a route graph: how they grow, what flows along them, and how they are kept."""
