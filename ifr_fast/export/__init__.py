"""A RouteGraph in other formats and as pictures; each module is imported when it is called."""
