"""The front end: the command ``icarus serve``, adapter folders, loading over HTTP, the watched folder, metrics."""
