"""The page of a study: its answer, tables and figures in one HTML file that needs no network."""
