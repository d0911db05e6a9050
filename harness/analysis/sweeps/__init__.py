"""Several runs of a study as one table: by pipeline stages, by batch, by cache. A run is a `Point`, in `point.py`."""
