"""Makes tables and pictures from the files of results, without measuring anything."""
