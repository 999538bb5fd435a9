"""The report after an export: measured facts as JSON, a table for the terminal, and one self-contained page."""
