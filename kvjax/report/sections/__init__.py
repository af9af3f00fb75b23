"""The sections of a report: what each shows, as words, charts and tables."""
