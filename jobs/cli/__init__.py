"""Running a command: parsing, errors, progress. May import pipeline and model."""
