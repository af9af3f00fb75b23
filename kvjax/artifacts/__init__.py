"""Files: run directories, tables, parameter stores and provenance."""
