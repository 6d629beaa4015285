"""report.html: what was exported and why it can be trusted, for a person."""
