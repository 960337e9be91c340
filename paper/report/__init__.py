"""The pieces of the report (paper/make_report.py): one file for each thing that a page shows. No torch here."""
