"""Running a bundle: sessions, streams and the backends under them. Imports neither torch nor the exporter."""
