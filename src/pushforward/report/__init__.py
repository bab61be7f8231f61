"""One HTML page that answers the questions of the library for one network."""
