"""RouteGraph and Routes, the public faces of a graph, and the comparison of two graphs."""
