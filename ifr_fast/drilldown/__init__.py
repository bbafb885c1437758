"""Parts of a graph seen more closely: a head's map, a node in tokens, the neurons of an FFN."""
