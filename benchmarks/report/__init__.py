"""Tables and pictures of results; everything they say is read from the results' files."""
