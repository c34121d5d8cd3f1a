"""Tables and pictures of results, which only contain what the files of results contain."""
