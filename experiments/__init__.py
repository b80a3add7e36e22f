"""One file per table or figure; each runs, resumes and reports by itself."""
