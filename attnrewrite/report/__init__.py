"""Reports: rows, tables, pages, dumps."""
