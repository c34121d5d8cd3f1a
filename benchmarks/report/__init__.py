"""Tables and pictures of results, made only from the files of results."""
