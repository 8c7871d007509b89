"""What the user is told: rows, tables, pages, dumps."""
